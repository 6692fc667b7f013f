"""Models: small random ones for demo and tests (`tiny`), and what a batch is to each family of models."""
