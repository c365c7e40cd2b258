"""The failure store: keeps failed messages whole until they are resolved or a person decides."""
