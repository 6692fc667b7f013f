"""Lean DeepSpeed trainer. `README.md` is the map.

In: the YAML, a base model, pieces from the loaders. Out: checkpoints, an export and figures. Read `main`, `cli`, `build` and
`loop` (build, run, close), then `feed`, `training` with `losses`, `models`, `engine`, `checkpoints`, `evals`, `report` and
`process`. A trained policy: `policy`, with `policy_io`, `policy_loading`, `policy_chunks` and `policy_options`; `serving`, `sim`.
Beside a training: `check`, `plan`, `bench`, `examples`.
"""
