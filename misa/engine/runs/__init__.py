"""Run folders: open, read and score them."""
