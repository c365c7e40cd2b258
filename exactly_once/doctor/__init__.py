"""Looks at what a promise rests on, and says what to do. `looking` goes through it all; each other module looks at one part."""
