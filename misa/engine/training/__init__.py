"""From an `Experiment` to a trained run folder."""
