"""One cell at work: what it is made of, the model it stands on, its record, the model it leaves behind."""
