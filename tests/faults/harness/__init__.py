"""What the rows of the fault matrix are made of: real programs, a network that fails, and a ledger."""
