"""Reports of simulated runs: JSON for programs, a page for people."""
