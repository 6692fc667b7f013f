"""One optimizer step: micro-batches -> loss -> gradient -> applied or not.

In: `feed.batch.StepBatch`. Out: `StepResult`.
Read `inputs` (uint8 -> arguments of forward), `loss` (what is reported), `objective` (what is minimised), `chunks` (the same
without the matrix of logits), `step`, then `split` (one split of the data), `source_table` (figures of each source),
`bad_samples` (what was left out) and `flops` (MFU). Asked once at the start: `packed`, `chunk_check` and `mask_check` (may this
model train packed rows, in chunks, without a mask? does it see what it should predict?).
"""
