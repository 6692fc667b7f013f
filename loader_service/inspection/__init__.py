"""`loader-inspect`: the rows that a config makes of the data, as a trainer would receive them.

In: the config and its data. Out: text, JSON or PNG files for people. It runs the same code that answers tickets.
Read `command`, `rows` (which rows), `show` (a row as text) and `pictures`.
"""
