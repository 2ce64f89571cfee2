"""Data sources, tokenization, and the rows that models read."""
