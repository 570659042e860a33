"""A model with adapters in it."""
