"""Lean DeepSpeed trainer. `README.md` is the map.

In: the YAML, a base model, pieces from the loaders. Out: checkpoints, an export and figures.
Read `main`, `build` and `loop` (build, run, close), then `feed`, `training`, `checkpoints`, `evals` and `report`.
"""
