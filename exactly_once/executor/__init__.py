"""Runs deliveries on threads and on the loop: which handler, beside which others, and how many at a time."""
