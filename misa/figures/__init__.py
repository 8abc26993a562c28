"""Figures and images: functions from arrays to matplotlib figures or pixels."""
