"""What a training run is made of: its recipe, its trainer, and what keeps, measures and ends it."""
