"""Prediction by a trained student."""
