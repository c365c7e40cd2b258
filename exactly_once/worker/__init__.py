"""Receives deliveries, has them run, settles them, and stops. Knows no broker, no database and no handler."""
