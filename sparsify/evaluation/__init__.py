"""Evaluators: a pruned model in, metrics out."""
