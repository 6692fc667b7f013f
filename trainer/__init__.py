"""Lean DeepSpeed trainer: loaders -> feed -> step -> checkpoint, export. `README.md` is the map."""
