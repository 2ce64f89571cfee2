"""What a report is made of: its tables, plots, provenance and baselines of equal size."""
