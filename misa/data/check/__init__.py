"""Check a data set for errors."""
