"""Scores of predictions: mask AP and mean IoU."""
