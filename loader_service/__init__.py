"""The loader: data on disk or behind URLs -> pieces of training batches over ZeroMQ. `README.md` is the map.

In: the YAML that trainers read too, and the data that it names. Out: PIECE messages, and a cache folder beside the data. Read
`cli` (the commands), `shards` (an entry's files) with `paths`, `sources` (reading data), `remote` (data behind URLs), `prepare`
(scan) with `manifest` and `cache_folder`, `plan` (order), `pieces` (ticket -> piece) with `disk_cache`, `server`; then the tools:
`inspection`, `doctor`, `top`, `replay` and `convert`.
"""
