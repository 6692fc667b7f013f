"""What a run would take, before it starts: memory of a rank, size of a checkpoint, steps, tokens, loaders (`--plan`).

In: a config and figures that the user passes. Out: a table, or the same as JSON. No weight is read and no rank is started.
Read `shape` (the model without weights), `memory` (bytes per rank, pure arithmetic), `activations` (what a forward keeps for
the backward), `report` (all of it together), `command` (its options).
"""
