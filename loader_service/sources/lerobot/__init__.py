"""LeRobot data sets (v2.1 and v3.0): tables in parquet, cameras in mp4 or in image columns, an index in `meta/`."""
