"""One run on several machines without a cluster manager: the same launcher on every node, and node 0 where they meet.

In: a config with `cluster.num_nodes` above 1, and which node this is. Out: this node's loaders and ranks, and an exit code.

    every node    meet: versions, configs, addresses ── start loaders ── exchange their addresses ── start ranks ── end together

Read `membership` (which node this is, from options, a hostfile, Slurm or torchrun; pure), `plan` (what this node starts; pure),
`facts` (what must be the same on all nodes), `coordinator` (node 0's rules: who is here, what is agreed, who is lost; pure),
`meeting` (the sockets), `run` (the course of a run), `ssh` (starts the other nodes of a hostfile), `start` (from the command
line to a run).
"""
