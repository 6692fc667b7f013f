"""Validation.

In: the stepper and one pass over the validation split. Out: metrics by name, equal on all ranks.
Read `scores` (sums and metrics of one micro-batch), then `validation` (the pass).
"""
