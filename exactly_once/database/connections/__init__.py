"""What is known of a pool's connection, and what other code may have done with it."""
