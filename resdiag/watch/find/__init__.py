"""Find: follow one forward pass and see it as residual blocks."""
