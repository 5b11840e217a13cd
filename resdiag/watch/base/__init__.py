"""What everything else here stands on: the catalogue, the roles of functions, warnings.

`catalog`, `site_metrics` and `custom` need no torch: plots and tables do not have it.
"""
