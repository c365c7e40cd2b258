"""How each database server is spoken to. `contract` says what a dialect is; the others are one server's each."""
