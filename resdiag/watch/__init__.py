"""Watching: find the residual blocks of any model and record what happens to them.

Imports torch and numpy only; `base.catalog` imports neither.
"""
