"""Messages as brokers' clients hand them out, read without importing a client. Called by `message` and by transports."""
