"""Other ways to place requests, to compare the scheduler with: each binds a request when it arrives."""
