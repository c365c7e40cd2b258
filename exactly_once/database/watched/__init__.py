"""Watches a handler's transaction from its claim to our COMMIT: whether it is still the same transaction."""
