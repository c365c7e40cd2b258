"""What a database error means: which database raised it, whether it passes, and what to do."""
