"""One optimizer step: micro-batches -> loss -> gradient -> applied or not.

In: `feed.batch.StepBatch`. Out: `StepResult`.
Read `inputs` (uint8 -> arguments of forward), `loss` (what is reported), `objective` (what is minimised), `chunks` (the same
without the matrix of logits), `step`, then `source_table` (figures of each source), `packed` and `chunk_check` (may this model
train packed rows, or in chunks?) and `flops` (MFU).
"""
