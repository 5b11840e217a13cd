"""Studies: the cell, one idempotent and resumable run with its verdict."""
