"""A model as a row of blocks: loading it, walking it, what its layers see, its loss and gradients."""
