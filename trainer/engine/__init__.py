"""DeepSpeed and the ranks.

In: config and model. Out: an engine, and figures that are equal on all ranks.
Read `ranks` (every collective operation), `zero` (start, settings, engine), `zero_stage`, `weight_files` and `host_memory`,
`optimizer` (parameter groups, average of the weights, learning rate), `averages` (the average in DeepSpeed's files), `universal`
(for another number of ranks).
"""
