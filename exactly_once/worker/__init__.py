"""Receive, run, settle, stop. Knows no broker, no database and no handler."""
