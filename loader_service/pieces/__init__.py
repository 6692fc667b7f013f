"""Ticket -> piece.

In: tickets from `server.pool`, plans from `plan`, records from `sources`. Out: frames of pieces.
Read `service` (one worker's parts) and `worker` (its process), `builder` (threads), `read_ahead` (which records are decoded next
and which are kept), `encoder` (record -> encoded samples), `text_samples`, `piece` and `changed_shards`.
"""
