"""Record: measure the tensors of a pass and their gradients, in eager and compiled passes alike."""
