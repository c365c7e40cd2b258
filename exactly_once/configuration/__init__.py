"""Where the program runs: settings, from the environment, from a file and from code."""
