"""Leases: claims that are committed before the handler runs and have an end, and the steps that the handler records."""
