"""Propagation backends: loops compiled by numba on the CPU, Triton kernels on CUDA, torch operations elsewhere."""
