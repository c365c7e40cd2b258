"""Settings: where the program runs, from the environment, from a file and from code."""
