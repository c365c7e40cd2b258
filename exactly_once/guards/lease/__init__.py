"""Leases: a claim that stands while a handler works, and the steps that it records."""
