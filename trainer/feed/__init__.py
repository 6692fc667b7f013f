"""How a rank gets its micro-batches from the loaders.

In: config, split, rank. Out: `StepBatch`es of numpy arrays, in the order of the epoch's stream. Read `feed` (the interface),
`batch` (pieces -> arrays) with `buffers` (memory that is used again), `prefetch` (decode threads), `sockets` and `handshake`
(ZeroMQ), `discovery` (loaders that join and leave), `digest_log`; then `dataset` and `hugging_face` (the same batches for other
training loops). `client` has the rules of who is asked for what.
"""
