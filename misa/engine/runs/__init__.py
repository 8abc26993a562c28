"""A run folder: open it, read it, score it."""
