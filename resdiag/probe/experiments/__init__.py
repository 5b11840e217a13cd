"""The experiments of an examination: each answers one question about a model and one batch."""
