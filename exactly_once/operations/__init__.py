"""What a person does to claims, steps and leases: each is one transaction, asked for at the command line."""
