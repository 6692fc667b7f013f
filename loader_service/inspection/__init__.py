"""`loader-inspect`: the rows that a config makes of the data, as a trainer would receive them.

In: the config and its data. Out: text, JSON, PNG files or a page of HTML for people. It runs the same code that answers
tickets. Read `command`, `rows` (which rows), `show` (a row as text), `pictures`, and `page` with `charts` and `style`.
"""
