"""From an `Experiment` to a trained, scored run folder."""
