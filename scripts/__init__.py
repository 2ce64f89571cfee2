"""Programs run from a checkout, and what they share. Never installed."""
