"""The loader: data on disk or behind URLs -> pieces of training batches over ZeroMQ. `README.md` is the map.

In: the YAML that trainers read too, and the data that it names. Out: PIECE messages, and a cache folder beside the data.
Read `cli` (the commands), `sources` (reading data), `prepare` (scan), `plan` (order), `pieces` (ticket -> piece), `server`.
"""
