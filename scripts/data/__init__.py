"""Data sources, and how their rows become what a model reads."""
