"""A loader's front: speaks the protocol of `proto/PROTOCOL.md`.

In: HELLO, EPOCH and TICKET messages of ranks. Out: WELCOME or REFUSE, LANES, and PIECE frames that `pieces` made. Read `command`
(loader-serve), `served` (what one loader serves) with `shard_selection` (`--shards`), `server` (the socket's loop), `handshake`,
`clients`, `outbox` (bounds), `waiting`, `planner` (epoch plans ahead of need), `pool` (worker processes), `gate` and `keys` (who
may connect), `refusals` (counted and logged), `listening`, `connections` (their limit), `relay` (resets do not reach ZeroMQ),
`counters`, `operator_pages` (metrics, health), `loop_calls`, `health` (also systemd's watchdog), `run_directory`.
"""
