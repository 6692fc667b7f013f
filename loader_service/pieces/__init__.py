"""Ticket -> piece.

In: tickets from `server.pool`, plans from `plan`, records from `sources`. Out: PIECE frames.
Read `service` (one process's parts) and `worker` (a worker process), `builder` (threads), `read_ahead` (which records are decoded
next), `record_cache` (which are kept), `encoder` (record -> encoded samples), `text_samples`, `excluded`, `piece`,
`changed_shards`, and `device_images` (frames encoded on a GPU).
"""
