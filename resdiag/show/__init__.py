"""Showing: the plots, and the text that tells what to read in them."""
