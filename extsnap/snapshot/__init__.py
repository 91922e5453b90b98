"""extsnap."""
