"""Training: from an `Experiment` to a run folder."""
