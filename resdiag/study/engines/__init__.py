"""Engines: they start cells and nothing else; what a cell does is the same under each of them."""
