"""What one batch says of a network: without training, and by experiments on copies."""
