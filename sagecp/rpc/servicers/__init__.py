"""One servicer per service of the contract: convert, call the manager, convert back."""
