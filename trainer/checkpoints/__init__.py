"""What a run leaves on disk, whole or not at all.

In: engine and cursor. Out: checkpoint folders that a run resumes from, and the export that transformers loads.
Read `state` (what a checkpoint says of itself), `save`, `durable`, `lock` (one run per output folder), `export`.
"""
