"""`loader-bench`: a trainer without a model, to measure loaders.

In: a config and loaders' addresses. Out: figures and a digest of every row. Read `command`, then `report`; for `--plan` also
`capacity` (the model), `planning` (what it is fitted to) and `null_loader`.
"""
