"""Encoded records on the disk of a host, shared by its loaders and by the runs that follow (`loader.disk_cache_gb`).

In: (key, bytes of a record) from `pieces.caching_encoder`. Out: the same bytes, or nothing. What they mean is not known here.
Read `segment` (the two files that a process appends to), `eviction` (which segments go), `store` (index, reading, writing) and
`folder` (where it lies, and whether it can be written).
"""
