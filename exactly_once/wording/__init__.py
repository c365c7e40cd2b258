"""Text for people: made safe to print, without secrets and without values, from errors and from messages."""
