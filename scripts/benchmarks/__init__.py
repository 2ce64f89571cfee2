"""
What `scripts/benchmark.py` measures: a module a subject, each with `cases(device_type)`, which gives
[`measuring.Case`]. A case builds two functions, ours and what it is measured against, on the same tensors.
"""
