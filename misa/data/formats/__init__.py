"""Annotation formats that are read and written."""
