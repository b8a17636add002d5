"""Prediction: how long steps take, how long answers get, and how right that was."""
