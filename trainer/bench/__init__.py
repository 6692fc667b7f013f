"""`loader-bench`: a trainer without a model, to measure loaders.

In: a config and loaders' addresses. Out: figures and a digest of every row. Read `command`, then `report`.
"""
