"""`loader-prepare`: shards -> manifest (records, samples, statistics) and a fitted action codec, cached beside the data."""
