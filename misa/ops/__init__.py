"""Pure functions on tensors: the paper's equations, without state."""
