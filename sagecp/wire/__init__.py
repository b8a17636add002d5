"""Values of the core as messages of the contract, and back: what server, client and agent share."""
