"""Readers, generators and pipelines of images with boxes."""
