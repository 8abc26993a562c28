"""Loops of the CPU path, compiled by numba: trees of a grid, sums over trees, windows around pixels."""
