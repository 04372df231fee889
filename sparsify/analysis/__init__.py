"""Curves of a model as arrays: how pruning errors grow over depth, and what two neighbouring blocks do when swapped."""
