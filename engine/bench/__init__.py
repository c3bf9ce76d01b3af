"""Measuring: what the loaders and the training step give on this machine. What trains knows nothing of it."""
