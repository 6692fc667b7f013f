"""DeepSpeed and the ranks.

In: config and model. Out: an engine, and figures that are equal on all ranks.
Read `zero` (settings, start, engine), `optimizer` (learning rate, groups), `universal` (checkpoints for another number of ranks).
"""
