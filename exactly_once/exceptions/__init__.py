"""What an exception asks for, and what it says: stops, parts of a group, and its words without a value of a statement."""
