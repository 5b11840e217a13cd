"""Loop: `attach`, the `Monitor`, and what they see of a training loop."""
