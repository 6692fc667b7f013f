"""Which sample comes when: an epoch's stream of rows as a pure function of lengths, seed and epoch.

In: the number of rows of each lane. Out: the lane and row at each position of the stream. No state, no I/O.
Read `lanes` (one source), `mixture` (several sources, by weight), then `stream` (the config's sources -> the stream of a run).
"""
