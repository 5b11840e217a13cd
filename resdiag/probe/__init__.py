"""What one batch says of a network, without training."""
