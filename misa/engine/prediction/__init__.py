"""A trained student on images."""
