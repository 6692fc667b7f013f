"""What a run leaves on disk, whole or not at all.

In: engine, cursor and fingerprints. Out: checkpoint folders from which a run resumes, and the export that transformers loads.
Read `state` (stoker.json and the rules of a resume), `changes`, `best`, `save` (what a checkpoint's folder holds) with
`background` and `write_errors`, `lock` (one run per output folder), `export` with its `card`, `from_checkpoint` (the export of
what is on disk) with `weights`, and `command` (stoker-export).
"""
