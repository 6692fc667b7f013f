"""`chat`: rows of the usual chat formats -> dialogues with images.

In: rows of tables (`sources.tables`). Out: `Sample`s of turns.
Read `dataset`, `formats` (row -> messages), `message`, `calls` (of functions), `turn_fields` (flags and reasoning), `parts`
(content in parts), `repair` (broken dialogues), `frames` (images).
"""
