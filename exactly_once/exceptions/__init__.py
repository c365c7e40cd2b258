"""What an exception asks for, and its text: stops, members of exception groups, and error texts without a statement's values."""
