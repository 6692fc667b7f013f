"""One optimizer step: micro-batches -> loss -> gradient -> applied or not.

In: `feed.batch.StepBatch`. Out: `StepResult`.
Read `inputs` (uint8 -> arguments of forward), `loss` (what is reported), `objective` (what is minimised), `step`, then
`source_table` (figures of each source), `packed` (may this model train packed rows?) and `flops` (MFU).
"""
