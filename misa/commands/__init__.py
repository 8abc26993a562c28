"""Box-supervised instance segmentation (MISA, IJCAI-24)."""
