"""What the loader is measured against, on the same files.

`straight`: the same libraries put together by hand, nothing else: no order beyond a shuffle of records, no resume, no other
process. `naive`: what most training scripts do, a torch DataLoader that opens the NPZ for every sample.
Both print one line of JSON: samples, CPU ms per sample, samples per second.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import random
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

BATCH = 32
QUALITY = 95


def main() -> None:
    """Run one pipeline over the first `--samples` samples of a JSONL."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", choices=["straight", "naive"])
    parser.add_argument("jsonl", type=Path)
    parser.add_argument("--samples", type=int, default=10**9)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.jsonl.open()]
    random.Random(0).shuffle(rows)
    run = straight if arguments.pipeline == "straight" else naive
    if run is straight:
        import deflate  # noqa: F401 - imports are not part of the measurement, for either
        import pybase64  # noqa: F401
        import simplejpeg  # noqa: F401
    else:
        import torch.utils.data  # noqa: F401
        from PIL import Image  # noqa: F401
    cpu, wall = sum(os.times()[:4]), time.perf_counter()
    samples = run(rows, arguments.jsonl.parent, arguments.samples, arguments.threads)
    cpu, wall = sum(os.times()[:4]) - cpu, time.perf_counter() - wall
    print(json.dumps({"samples": samples, "cpu_ms_per_sample": 1e3 * cpu / samples, "samples_per_s": samples / wall}))


def straight(rows: list[dict[str, Any]], root: Path, limit: int, threads: int) -> int:
    """Trajectory by trajectory in a thread pool: read, inflate, JPEG, Base64, action bins, msgpack per 32 samples."""
    done = 0
    with ThreadPoolExecutor(threads) as pool:
        for samples, frames in pool.map(lambda row: _straight_record(row, root), rows):
            done += samples
            assert frames
            if done >= limit:
                pool.shutdown(cancel_futures=True)
                break
    return done


def _straight_record(row: dict[str, Any], root: Path) -> tuple[int, list[bytes]]:
    import pybase64
    import simplejpeg

    actions = np.asarray(row["actions"], np.float32)
    ids = 1023 - np.digitize(np.clip(actions, -1, 1), np.linspace(-1, 1, 256))
    prompt = list(range(20))
    packed = []
    batch: list[dict[str, Any]] = []
    for t, frame in enumerate(frames(root / row["obs_path"], len(actions))):
        jpeg = simplejpeg.encode_jpeg(frame, QUALITY, "RGB", "420")
        batch.append({"ids": prompt + ids[t].tolist(), "image": pybase64.b64encode(jpeg)})
        if len(batch) == BATCH or t == len(actions) - 1:
            packed.append(msgpack.packb(batch))
            batch = []
    return len(actions), packed


def frames(path: Path, count: int) -> Any:
    """Frames of `rgb.npy`: inflated at once where deflated, one pread each where stored."""
    import deflate

    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        tail = os.pread(file.fileno(), min(size, 4096), max(0, size - 4096))
        start = tail.index(b"PK\x01\x02")
        method, compressed, plain = (
            struct.unpack_from("<H", tail, start + 10)[0],
            *struct.unpack_from("<II", tail, start + 20),
        )
        offset = struct.unpack_from("<I", tail, start + 42)[0]
        local = os.pread(file.fileno(), 4096, offset)
        data = offset + 30 + sum(struct.unpack_from("<HH", local, 26))
        if compressed == 0xFFFFFFFF:
            compressed = plain = size  # zip64, as np.savez writes members of unknown size
        if method == 8:
            if plain == size:
                raise SystemExit("the benchmark's data should not be zip64")
            raw = deflate.deflate_decompress(os.pread(file.fileno(), compressed, data), plain)
            header = 10 + struct.unpack_from("<H", raw, 8)[0]
            shape = _shape(bytes(raw[10:header]))
            yield from np.frombuffer(raw, np.uint8, offset=header).reshape(shape)[:count]
            return
        header = 10 + struct.unpack("<H", os.pread(file.fileno(), 2, data + 8))[0]
        shape = _shape(os.pread(file.fileno(), header - 10, data + 10))
        frame = int(np.prod(shape[1:]))
        for t in range(count):
            raw = os.pread(file.fileno(), frame, data + header + t * frame)
            yield np.frombuffer(raw, np.uint8).reshape(shape[1:])


def _shape(header: bytes) -> tuple[int, ...]:
    text = header.decode()
    return tuple(int(part) for part in text[text.index("(") + 1 : text.index(")")].split(",") if part.strip())


def naive(rows: list[dict[str, Any]], root: Path, limit: int, workers: int) -> int:
    """Every sample opens its NPZ with np.load and encodes with Pillow, in DataLoader workers."""
    from torch.utils.data import DataLoader

    index = [(row["obs_path"], t, row["actions"][t]) for row in rows for t in range(len(row["actions"]))]
    random.Random(1).shuffle(index)
    dataset = _NaiveDataset(index[:limit], root)
    return sum(len(batch) for batch in DataLoader(dataset, BATCH, num_workers=workers, collate_fn=list))


class _NaiveDataset:
    def __init__(self, index: list[tuple[str, int, list[float]]], root: Path) -> None:
        self.index, self.root = index, root

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict[str, Any]:
        from PIL import Image

        path, t, action = self.index[i]
        frame: NDArray[np.uint8] = np.load(self.root / path)["rgb"][t]
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=QUALITY)
        ids = 1023 - np.digitize(np.clip(action, -1, 1), np.linspace(-1, 1, 256))
        return {"ids": [*range(20), *ids.tolist()], "image": base64.b64encode(buffer.getvalue())}


if __name__ == "__main__":
    main()
