"""Whether two runs that should agree do, and where they part first: `resdiag.diff`."""
