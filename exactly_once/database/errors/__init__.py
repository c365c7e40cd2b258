"""What an error of a database means: whose fault it is, whether it passes, and what to do."""
