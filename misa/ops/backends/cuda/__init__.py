"""The CUDA path in Triton's kernels. Importing this package alone imports no Triton."""
