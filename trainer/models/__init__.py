"""Models: loading a base model, and small random ones for demo and tests.

In: a folder with a transformers model. Out: the model, ready for the engine, and its family.
Read `families` (what differs between models), `loading`, then `tiny` and `tiny_tokenizer`.
"""
