"""Weights on grids of few levels, zeros in place: grids, rounding to nearest, GPTQ, and what that saves."""
