"""Plan: where the tensors of the blocks can be seen in a later pass, and whether it is the same."""
