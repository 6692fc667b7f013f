"""The work on a sample, the same in every peer that runs Python: inflate, JPEG q95, Base64, seven action ids.

The libraries are those of Stoker's loader (libdeflate, TurboJPEG, pybase64), which is the best case for a peer. With
PEER_LIBRARIES=usual only TurboJPEG is; numpy and Python's own Base64 do the rest, as in most training scripts.
"""

from __future__ import annotations

import base64
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pybase64
import simplejpeg
from contract import BATCH

sys.path.append(str(Path(__file__).resolve().parents[1]))  # behind this folder

from pipelines import QUALITY, frames

Row = dict[str, Any]
Sample = dict[str, Any]
PROMPT = list(range(20))
USUAL = os.environ.get("PEER_LIBRARIES") == "usual"


def read_rows(jsonl: Path) -> list[Row]:
    """The lines of the JSONL, numbered, with absolute paths."""
    rows = [json.loads(line) for line in jsonl.open()]
    return [{**row, "number": n, "path": str(jsonl.parent / row["obs_path"])} for n, row in enumerate(rows)]


def shuffled(rows: list[Row], epoch: int) -> list[Row]:
    """The trajectories in the order of an epoch."""
    rows = list(rows)
    random.Random(epoch).shuffle(rows)
    return rows


def trajectory_samples(row: Row) -> list[Sample]:
    """All samples of a trajectory, which is inflated once."""
    ids = action_ids(row["actions"])
    if USUAL:
        with np.load(row["path"]) as arrays:
            inflated = arrays["rgb"][: len(ids)]
    else:
        inflated = frames(Path(row["path"]), len(ids))
    return [encoded(row, t, frame, ids[t]) for t, frame in enumerate(inflated)]


def one_sample(row: Row, t: int) -> Sample:
    """One sample, for which the NPZ is opened and inflated, as many training scripts do."""
    with np.load(row["path"]) as arrays:
        frame = np.ascontiguousarray(arrays["rgb"][t])
    return encoded(row, t, frame, action_ids(row["actions"][t : t + 1])[0])


def encoded(row: Row, t: int, frame: np.ndarray, ids: np.ndarray) -> Sample:
    """frame: uint8[H, W, 3]."""
    return {"key": (row["number"], t), "ids": [*PROMPT, *ids.tolist()], "image": encoded_image(frame)}


def encoded_image(frame: np.ndarray) -> bytes:
    """JPEG q95 4:2:0 in Base64; frame: uint8[H, W, 3]."""
    jpeg = simplejpeg.encode_jpeg(frame, QUALITY, "RGB", "420")
    return base64.b64encode(jpeg) if USUAL else pybase64.b64encode(jpeg)


def action_ids(actions: list[list[float]]) -> np.ndarray:
    """int[T, 7]."""
    return 1023 - np.digitize(np.clip(np.asarray(actions, np.float32), -1, 1), np.linspace(-1, 1, 256))


def taken(samples: list[Sample]) -> tuple[np.ndarray, int]:
    """What `contract.Batches` wants of a batch."""
    return np.array([sample["key"] for sample in samples]), sum(len(sample["image"]) for sample in samples)


__all__ = ["BATCH", "QUALITY", "one_sample", "read_rows", "shuffled", "taken", "trajectory_samples"]
