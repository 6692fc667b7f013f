"""What the loader reads: one module or folder per kind of data, each a subclass of `base.BaseSFTDataset`.

In: a shard, and the place of a record in it. Out: `Sample`s; for a scan, `ScannedRecord`s.
Read `base` (the interface) with `samples` and `indexed` (classes of items by number), `options`, `trajectory` (one trajectory
-> samples), `mani_openpi` (JSONL and NPZ), `lerobot`; then `tables` (rows of JSON, parquet, Arrow and text) with `chat`, `code`
and `text`; `token_rows` (ids with labels), `fields` (those that nothing reads), `parquet` and `extras` serve several of them.
"""
