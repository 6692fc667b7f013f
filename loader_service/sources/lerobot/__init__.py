"""`lerobot`: LeRobot data sets, v2.1 and v3.0: tables in parquet, cameras in mp4 or in image columns, an index in `meta/`.

In: the folder or URL of a data set. Out: `Sample`s of trajectories.
Read `dataset`, `options`, `locate` (entry -> shards) and `remote`; the index: `meta`, `info`, `episodes`, `template`; one
episode: `scan`, `episode`, `rows` (parquet rows), `columns` (checked arrays), `video` and `image_column` (frames), `files`.
"""
