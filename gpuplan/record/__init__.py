"""What happened: the rows of a run, how they are taken down, kept, and turned into numbers."""
