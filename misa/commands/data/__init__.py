"""Bring a data set into the layout that misa reads."""
