"""Data sets: where they are, how they are read, kept and augmented."""
