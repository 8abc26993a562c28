"""Many trainings: rows times seeds, on this machine or a cluster."""
