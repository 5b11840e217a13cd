"""Explaining: what theory predicts, and the verdict on what was measured."""
