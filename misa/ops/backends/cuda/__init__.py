"""CUDA backend in Triton kernels. Importing this package does not import Triton."""
