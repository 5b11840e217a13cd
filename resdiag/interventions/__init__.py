"""Change one thing and compare: lesions of a variant's run and of any model."""
