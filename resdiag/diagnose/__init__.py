"""From a record to a verdict: findings, their evidence and what to try."""
