"""Processes one delivery for one handler: read, claim, handle, complete, commit, record. A batch shares one transaction."""
