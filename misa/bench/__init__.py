"""Timings against the literal or the official form, in turn in one process."""
