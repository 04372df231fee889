"""Curves of a model as arrays: error growth."""
