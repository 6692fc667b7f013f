"""`loader-doctor`: reads a sample of the data that a config names, checks it, and lists what it finds.

In: the config, its model folder and its data. Out: findings (error, warning, note) as text or JSON, and an exit code for CI.
It starts no server and trains nothing; scan, codec and rows come from the loader's own code.
Read `command`, `finding`, `facts` (what is kept of a record), `reading` (which records, and how), `preparing` (the scan, entry by
entry where it fails), `registry` (the names of all checks) and `checks` (the checks).
"""
