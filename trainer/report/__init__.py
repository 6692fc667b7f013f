"""What a run reports to its users: figures, progress bar, summary.

In: step results. Out: TensorBoard, WandB, the console and files in `output_dir`.
Read `trackers` with `charts` (TensorBoard's first page), `progress`, `budgets` (when a run has left out too much),
`data_wait` (is the run data-bound?), `loss_spikes`, `step_profile` (torch's profiler), `fleet` (the loaders as the first rank
sees them, and metrics).
"""
