"""Commands of a person that change claims, steps and leases. Each is one transaction. Called by the command line."""
