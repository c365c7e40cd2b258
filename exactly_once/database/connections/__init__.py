"""What is known of a connection of a pool, and what others may have done with it."""
