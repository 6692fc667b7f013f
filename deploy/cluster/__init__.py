"""One run on several machines of a Ray cluster.

In: a config and its placement. Out: loaders and ranks as processes on the cluster's nodes, and one exit code.
Read `plan` (which node runs what; pure), `agent` (one actor per node, which starts that node's processes), `run` (the
supervisor), `bound` (a process that ends with the one that started it).
"""
