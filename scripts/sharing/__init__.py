"""A model's repository on the Hub: the folder, its card, and the upload."""
