"""Text for people, from errors and from messages: safe to print, without secrets and without values."""
