"""Checks everything that the guarantees depend on, and says what to do. `looking` runs all checks; each other
module has one part."""
