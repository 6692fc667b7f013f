"""Data behind URLs: copies of their files on this host, within a size limit.

In: URLs of the data paths. Out: paths of local copies, each whole and of a known version.
Read `url`, `shared_store` (the store of a process), `store` (fetch on demand), `filesystem` and `timed_call` (fsspec with
deadlines), `copying` and `partial_file` (one download), `index` (SQLite), `pins` and `eviction` (what may be removed), `listing`
(entry -> shards).
"""
