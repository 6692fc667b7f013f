"""Files of rows: JSON lines, JSON arrays, parquet, Arrow, plain text and token files, compressed or not.

In: a shard. Out: its rows, found by a scan and read back one by one in any order.
Read `dataset` (what chat, code and text share), `table` (the interface), `open_table` (which kind a file is), `json_table`
with `json_array`, `parquet`, `arrow` (also parquet unpacked), `saved_folder` (of the datasets library), `plain_text`,
`token_file`, `unpack` (.gz and .zst).
"""
