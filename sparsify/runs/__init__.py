"""A run from outside: which components there are, what makes two runs the same, records, what a person sees."""
