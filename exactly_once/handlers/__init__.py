"""What a decorated function is: checked and prepared once, before its first message."""
