"""Models: loading a base model, small random ones for demo and tests, and OpenVLA.

In: a folder with a transformers model. Out: the model, ready for the engine, and its family. Importing this package makes
transformers' Auto classes know OpenVLA. Read `families` (what differs between models), `loading`, `lora`, `recomputing`
(gradient checkpointing), `registration`, `openvla`, `robot` (a small policy), then `tiny`, `tiny_vlms` and `tiny_tokenizer`
(small random models).
"""

from trainer.models.registration import register_models

__all__ = ["register_models"]
