"""`loader-prepare`: shards -> one manifest per entry, action statistics and a fitted action codec, cached beside the data.

In: the config and the shards of its entries. Out: `Prepared`: manifests, codec, statistics of the states.
Read `command`, `run` (all entries), `entry` (one entry) with `absent_shards` (shards of other hosts), `parts` (a part of a shard:
hash and scan), `scan_pool` (processes), `actions_state` (actions seen by a scan), `fit`, `mask` and `published` (statistics and
codec), `first_records`, `verify`, `summary`, `cleanup`. What a scan reports beside errors: `findings`, `statistics_check`,
`cameras`, `turn_ends`.
"""
