"""Frozen records of what happened to each delivery. Code that counts or shows them changes nothing of what happens."""
