"""Pseudo masks for the boxes of a dataset, with a quality estimate each."""
