"""
Where examples come from, one module a source.

A source has `Options`, a frozen dataclass of its settings in `[data]`, and `load(options)`, which gives a
`DatasetDict` with the splits `train`, `validation` and `test`. The columns are `text` or `input_values`, and `label`;
`values` for a sequence that is its own label.
"""

from scripts.sources import digits, files, hub, piano_roll, stdlib_code


SOURCES = {
    "stdlib_code": stdlib_code,
    "digits": digits,
    "files": files,
    "hub": hub,
    "piano_roll": piano_roll,
}
