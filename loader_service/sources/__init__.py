"""What the loader reads: one module or folder per kind of data, each a subclass of `base.BaseSFTDataset`.

In: a shard, and the place of a record in it. Out: `Sample`s; for a scan, `ScannedRecord`s.
Read `base` (the interface) with `samples` and `indexed` (classes of items by number), `options`, `trajectory` (one trajectory
-> samples) with `actions` and `tasks` (task -> instruction). `mani_openpi` reads JSONL and NPZ, with `mani_options`, `jsonl`,
`mani_arrays`, `npz`, `zip_directory`, `npy_header` and `named_files`. Then `lerobot`, and `tables` (rows of JSON, parquet, Arrow
and text) with `chat`, `code` and `text`. Several of them use `token_rows` (ids with labels), `fields` (those that nothing reads),
`record_numbers` (for messages), `half_characters`, `parquet`, `pictures`, `lfs` and `extras`.
"""
