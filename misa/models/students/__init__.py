"""Box-supervised students, and baselines of mmdet."""
