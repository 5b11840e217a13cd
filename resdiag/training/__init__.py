"""Training: data, recipe, loop, checkpoint."""
