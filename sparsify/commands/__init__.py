"""What is typed: the command line, plans, sweeps, exports."""
