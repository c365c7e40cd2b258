"""A transaction that a handler works in, watched from its claim to our COMMIT: whether it is still the one it was."""
