"""tf.data service: a dispatcher and a worker in a process of their own. It has no position: the first half is made again.

Its workers run TensorFlow's operations only, so inflating, JPEG and Base64 are TensorFlow's own. It inflates gzip but not ZIP:
the script puts a gzip header and trailer around the deflated member; it reads their fields from the ZIP directory.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import tensorflow as tf
from contract import BATCH, Ask, Batches, run, skip
from work import QUALITY, action_ids, read_rows, shuffled

service = tf.data.experimental.service
_GZIP_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"


def serve() -> None:
    """The server process: says its address, and ends with its standard input."""
    dispatcher = service.DispatchServer(service.DispatcherConfig(port=0))
    address = dispatcher.target.split("://")[1]
    worker = service.WorkerServer(service.WorkerConfig(dispatcher_address=address))
    print(dispatcher.target, flush=True)
    sys.stdin.read()
    del worker, dispatcher


@contextmanager
def opened(ask: Ask) -> Iterator[Callable[[int, int], Batches]]:
    """Start the server process."""
    server = subprocess.Popen(
        [sys.executable, __file__, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin
    assert server.stdout
    try:
        target = server.stdout.readline().strip()
        members = [member(row) for row in read_rows(ask.data)]
        yield lambda epoch, first: batches(ask, members, target, epoch, first)
    finally:
        server.stdin.close()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def member(row: dict[str, Any]) -> dict[str, Any]:
    """Where the deflated frames of a trajectory lie."""
    with zipfile.ZipFile(row["path"]) as file, open(row["path"], "rb") as raw:  # noqa: PTH123
        info = file.getinfo("rgb.npy")
        raw.seek(info.header_offset + 26)
        start = info.header_offset + 30 + sum(struct.unpack("<HH", raw.read(4)))
        with file.open(info) as array:
            np.lib.format.read_magic(array)
            shape, _, _ = np.lib.format.read_array_header_1_0(array)
            header = array.tell()
    if info.compress_type != zipfile.ZIP_DEFLATED:
        raise SystemExit(f"{row['path']}: rgb.npy is not deflated")
    return {
        "number": row["number"], "path": row["path"], "start": start, "size": info.compress_size, "header": header,
        "trailer": struct.pack("<II", info.CRC, info.file_size), "shape": shape, "ids": action_ids(row["actions"]),
    }  # fmt: skip


def frames_of(item: dict[str, tf.Tensor]) -> tuple[tf.Tensor, ...]:
    """Of all frames of a trajectory: keys, ids, uint8[T, H, W, 3]."""
    deflated = tf.strings.substr(tf.io.read_file(item["path"]), item["start"], item["size"])
    gzip = tf.strings.join([tf.constant(_GZIP_HEADER), deflated, item["trailer"]])
    plain = tf.io.decode_raw(tf.io.decode_compressed(gzip, "GZIP"), tf.uint8)
    frames = tf.reshape(plain[item["header"] :], item["shape"])
    times = tf.range(tf.shape(frames)[0], dtype=tf.int32)
    keys = tf.stack([tf.fill(tf.shape(times), item["number"]), times], axis=1)
    return keys, item["ids"], frames


def encoded(key: tf.Tensor, ids: tf.Tensor, frame: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """JPEG and Base64."""
    jpeg = tf.io.encode_jpeg(frame, "rgb", quality=QUALITY, chroma_downsampling=True)
    return key, ids, tf.io.encode_base64(jpeg, pad=True)


def batches(ask: Ask, members: list[dict[str, Any]], target: str, epoch: int, first_batch: int) -> Batches:
    """The epoch from a batch on."""
    items = shuffled(members, epoch)
    columns = {name: tf.constant(np.array([item[name] for item in items])) for name in ("ids", "shape")}
    columns |= {name: tf.constant([item[name] for item in items]) for name in ("path", "trailer")}
    columns |= {
        name: tf.constant([item[name] for item in items], tf.int32) for name in ("number", "start", "size", "header")
    }
    dataset = tf.data.Dataset.from_tensor_slices(columns)
    dataset = dataset.map(frames_of, num_parallel_calls=ask.workers).unbatch()
    dataset = dataset.map(encoded, num_parallel_calls=ask.workers).batch(BATCH)
    dataset = dataset.apply(service.distribute(processing_mode=service.ShardingPolicy.OFF, service=target))
    taken = ((keys, sum(map(len, images))) for keys, _, images in dataset.as_numpy_iterator())
    return skip(taken, first_batch)


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        run(opened)
