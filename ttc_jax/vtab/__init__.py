"""VTAB-1K: the 19 rows, and what prepares, checks and exports them."""
