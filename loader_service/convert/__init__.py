"""`loader-convert`: other people's episodes -> JSONL + NPZ that `mani_openpi` reads, once, before training."""
