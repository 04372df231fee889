"""Methods: the order in which statistics are taken, layers pruned and activations passed on."""
