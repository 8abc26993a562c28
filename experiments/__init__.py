"""The paper's rows as plain values: `ROWS` of each file maps a name to an `Experiment`."""
