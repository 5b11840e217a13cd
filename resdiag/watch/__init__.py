"""Find the residual blocks of any model and record what happens to them: torch and numpy only."""
