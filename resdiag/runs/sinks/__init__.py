"""Sinks: trackers that are told what a run records. The files of the run are the truth."""
