"""Losses: scalars from tensors, one file per term."""
