"""Ticket -> piece.

In: tickets from `server.pool`, plans from `plan`, records from `sources`. Out: PIECE frames. Read `service` (one process's parts)
and `worker` (a worker process), `builder` (threads), `read_ahead` (which records are decoded next), `record_cache` (which are
kept in memory), `encoder` (record -> encoded samples) with `sample_values` (checks the samples of a dataset class),
`text_samples` and `excluded`; `caching_encoder` with `stored_record` (encoded records on disk), `piece` (rows of a ticket, put
together), `changed_shards`, and `device_images` with `resample_weights` (frames resized and encoded on a GPU).
"""
