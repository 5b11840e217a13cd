"""What everything else here stands on: the roles of functions, tensors in structures, warnings."""
