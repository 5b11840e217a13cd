"""The residual networks that resdiag ships: a table of variants and one configurable network."""
