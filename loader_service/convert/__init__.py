"""`loader-convert`: recorded episodes of other programs -> JSONL and NPZ that `mani_openpi` reads. Runs once, before training.

In: pickled dicts, HDF5 or TFRecord files. Out: `train.jsonl` and one folder per episode with its frames.
Read `command`, `run` (list, estimate, write, verify), `episode` (what every format becomes), the formats `maniskill`,
`rl4vla` with `pickled`, and `rlds` with `example` and `tfrecord`; then `images`, `write` and `folder` (the output).
"""
