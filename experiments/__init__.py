"""The paper's rows: `ROWS` of each file maps names to `Experiment`s."""
