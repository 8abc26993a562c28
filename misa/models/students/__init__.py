"""Box-supervised students and mmdet's own baselines."""
