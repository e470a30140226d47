"""Inspect a model: its components, checks of its weights and training data, and attention maps."""
