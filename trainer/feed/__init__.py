"""How a rank gets its micro-batches from the loaders.

In: config, split, rank. Out: `StepBatch`es of numpy arrays, in the order of the epoch's stream.
Read `feed` (the interface), `batch` (pieces -> arrays), `prefetch` (decode threads), `sockets` and `handshake` (ZeroMQ),
`discovery` (loaders that join and leave), `digest_log`; then `dataset` and `hugging_face` (the same batches for other training
loops); the rules of who is asked for what are in `client/`.
"""
