"""Following a training while it runs: findings as they arise, a panel, a page on this machine."""
