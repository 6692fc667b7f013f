"""DeepSpeed and the ranks.

In: config and model. Out: an engine, and figures that are equal on all ranks.
Read `ranks` (every collective operation), `zero` (start, settings, engine), `optimizer` (parameter groups,
average of the weights, learning rate), `universal` (checkpoints for another number of ranks).
"""
