"""Evaluation of predictions: mask AP, mean IoU, error types, confidence intervals, mask quality."""
