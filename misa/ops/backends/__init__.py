"""The code that runs a propagation: loops compiled by numba on the CPU, torch operations on any other device."""
