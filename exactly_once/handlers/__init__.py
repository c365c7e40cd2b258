"""Checks and prepares a decorated function once, before its first message."""
