"""Searches over sparsity profiles: propose, measure, keep the budget."""
