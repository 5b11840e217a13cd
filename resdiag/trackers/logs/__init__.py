"""Logs that other tools wrote, read as runs: the numbers per step, without blocks."""
