"""
Sources of examples, one module for each.

A source has `Options`, a frozen dataclass of its settings in `[data]`, and `load(options)`, which returns a
`DatasetDict` with the splits `train`, `validation` and `test`. The columns are `text` or `input_values`, and `label`;
`values` for a sequence that is its own label; for a time series one column a channel and one row a step.
"""

from scripts.data.sources import (
    digits,
    files,
    hub,
    mnist,
    penn_treebank,
    piano_roll,
    regular_languages,
    stdlib_code,
    time_series,
    wikipedia,
)


SOURCES = {
    "stdlib_code": stdlib_code,
    "digits": digits,
    "files": files,
    "hub": hub,
    "mnist": mnist,
    "penn_treebank": penn_treebank,
    "piano_roll": piano_roll,
    "time_series": time_series,
    "wikipedia": wikipedia,
    "regular_languages": regular_languages,
}
