"""Load balancers: scores behind the `load_balanced` strategy. One module each."""
