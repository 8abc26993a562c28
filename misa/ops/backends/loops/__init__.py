"""Loops of the CPU backend, compiled by numba: spanning trees, sums over trees, windows around pixels."""
