"""Allocators: how much of the budget each layer gets. They never touch a weight."""
