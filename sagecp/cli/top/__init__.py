"""`sagecp top`: the fleet on one screen, as it changes, and the keys that act on it."""
