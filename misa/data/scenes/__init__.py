"""The embedded data: synthetic scenes with known ground truth."""
