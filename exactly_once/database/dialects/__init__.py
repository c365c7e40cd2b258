"""The statements and error codes of each database server. `contract` says what a dialect is; each other
dialect is one server's."""
