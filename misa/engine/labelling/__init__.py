"""Masks for the boxes of a data set, with an estimate of how good each is."""
