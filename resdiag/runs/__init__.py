"""Runs on disk: the folder, its commit protocol, and reading it back as tidy frames."""
