"""Pruners: which weights of one matrix go, and what happens to the others."""
