"""One database, as the application uses it: engines, sessions, our tables, and whether a handler is still in its transaction."""
