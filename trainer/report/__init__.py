"""What a run reports to its users: figures, progress bar, summary, bad samples.

In: step results. Out: TensorBoard, WandB, the console and files in `output_dir`.
Read `trackers`, `progress`, `bad_samples`, `loss_spikes`, `fleet` (the loaders as the first rank sees them, and metrics).
"""
