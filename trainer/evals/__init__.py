"""Evaluations during a run.

In: the run after a step: stepper, processor, validation split, a way to export. Out: figures by name, at the step they are of.
Read `interface` (what an evaluation is), `registry` (the entries of `trainer.evals`), `schedule` (when they begin), then the one
that is here: `validation` (one pass over the validation split) with `scores` (sums and metrics of one micro-batch) and
`action_figures` (free-running errors, the best constant action, tokens that vary); `example_sheet` (a picture of some samples).
"""
