"""One delivery for one handler: read, claim, handle, complete, commit, record. A batch is several in one transaction."""
