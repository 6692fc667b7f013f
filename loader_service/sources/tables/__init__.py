"""Rows of JSON lines, JSON arrays and parquet files, compressed or not: found by a scan, read back one by one in any order."""
