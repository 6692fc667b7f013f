"""What the loader reads: one module per kind of data, each a `BaseSFTDataset`."""
