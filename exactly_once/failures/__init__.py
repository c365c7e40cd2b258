"""The failure store: what failed, whole, until it is resolved or a person decides."""
