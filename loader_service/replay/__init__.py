"""`stoker-batch`: the rows that any step of any run trained, made again without loaders and compared with the run's log.

In: the `output_dir` of a run (its digest logs and `stoker_proto.run_record`) and the data. Out: rows for people, and an error
that names each record that is no longer what the run trained. Read `command`, `step` (which rows a step has), `rebuild` (rows
-> pieces -> digests), `compare`, and `loss_spikes` (the steps whose loss rose most).
"""
