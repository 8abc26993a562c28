"""What supervises a student besides its own head: one file an objective, named by a row (`Experiment.objective`).

A file holds one frozen dataclass of constants, called as the file but for upper case, and composes functions of
`misa.ops` and `misa.losses`. It imports torch within its methods only, so that a table of rows loads at once.
"""
