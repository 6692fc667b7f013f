"""`lerobot`: LeRobot data sets, v2.1 and v3.0: tables in parquet, cameras in mp4 or in image columns, an index in `meta/`.

In: the folder or URL of a data set. Out: `Sample`s of trajectories. Read `dataset`, `options`, `locate` (entry -> shards) and
`remote`, `compatibility` (of several data sets); the index: `meta`, `info`, `episodes` (where each episode lies), `template`; one
episode: `scan`, `episode`, `rows` (parquet rows), `columns` (checked arrays), `video` with `presentation_order`, and
`image_column` (frames), `files`.
"""
