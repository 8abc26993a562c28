"""The embedded data: drawn scenes with a known truth."""
