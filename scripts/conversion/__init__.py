"""Convert other models into R-Transformers and RSA heads."""
