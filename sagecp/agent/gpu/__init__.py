"""The GPUs of an engine: which they are, how they do, and why nothing is known where nothing is."""
