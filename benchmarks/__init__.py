"""Measurements against a plain form, in turn in one process; not part of the package."""
