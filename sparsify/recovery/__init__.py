"""Training after pruning: low-rank adapters that keep every zero, and how LoSA shares out their ranks."""
