"""What is recorded, in words: every metric with its formula, unit, source and reading."""
