"""The commands: one file each; each parses, calls a room below, and prints."""
