"""`loader-top`: the fleet live, and what limits it.

In: `/metrics` pages of loaders and of a trainer. Out: a table that renews itself, or one look as text or JSON.
Read `command`, `scrape` (pages -> figures of one moment), `fleet` (two moments -> what each did between them, and the verdict),
then `view` (the table).
"""
