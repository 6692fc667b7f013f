"""One optimizer step: micro-batches -> loss -> gradient -> applied or not.

In: `feed.batch.StepBatch`. Out: `StepResult`.
Read `inputs` (uint8 -> what the model's forward takes), `step`, then `source_table`, `packed`, `image_counts` and `flops`.
"""
