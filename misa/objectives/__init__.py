"""Objectives, the mask losses of a student: one file each, chosen by a row (`Experiment.objective`).

A file holds one frozen dataclass of constants, named as the file up to case, that composes functions of `misa.ops` and
`misa.losses`. It imports torch only inside methods, so that a table of rows loads fast.
"""
