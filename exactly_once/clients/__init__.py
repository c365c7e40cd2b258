"""Reads messages of brokers' clients without importing a client. Called by `message` and by transports."""
