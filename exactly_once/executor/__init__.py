"""Runs deliveries on threads and on the event loop: by which handlers, in which batches, and how many at a time."""
