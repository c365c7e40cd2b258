"""A broker in a table of the application's database."""
