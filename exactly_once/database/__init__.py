"""One database, as the application uses it: engines, sessions, our tables, and one watched transaction."""
