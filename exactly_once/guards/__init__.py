"""What remembers claims. `contract` says what a guard can do; the others are one kind each, and what they share."""
