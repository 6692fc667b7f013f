"""Loader servers: shard -> sample -> tokens -> piece -> wire."""
