"""Tables, plots and provenance of a report, and baselines with equal numbers of parameters."""
