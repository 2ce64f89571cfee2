"""Other models as R-Transformers and RSA heads."""
