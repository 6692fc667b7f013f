"""Tensors made by a hash of their names: the same numbers in every environment, so that none of them has to be stored.

Imports numpy alone, as `make_golden.py` uses it in another environment.
"""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

FIRST_ACTION, END_ACTION = 31744, 32000
LAST_PIXELS = (2, 6, 56, 56)
FRAME_SHAPES = {"landscape": (61, 95, 3), "portrait": (92, 59, 3), "square": (80, 80, 3)}
"""Of odd differences: a crop of 31 pixels too many is where rounding shows, and a border of 33 where it is not a square."""


def uniform(name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """float64 in [-1, 1). PCG64's raw stream is the part of numpy's generators that never changes."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    raw: Any = np.random.PCG64(seed).random_raw(int(np.prod(shape)))
    return ((raw >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0).reshape(shape)


def weight(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A parameter of the model that keeps activations near 1, and in which every tensor matters."""
    values = uniform(name, shape)
    if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "layernorm.weight", "scale_factor")):
        values = 1.0 + 0.3 * values
    elif name.endswith(".bias") or len(shape) == 1:
        values = 0.2 * values
    elif len(shape) >= 2 and name.endswith(".weight") and "embed_tokens" not in name:
        values = values * np.sqrt(3.0 / np.prod(shape[1:]))
    if name.endswith("lm_head.weight"):
        values[FIRST_ACTION:END_ACTION] *= 4.0  # the largest logit of all is an action's
    return values.astype(np.float32)


def frame(kind: str) -> NDArray[np.uint8]:
    """A camera frame uint8[H, W, 3] of smooth waves and some noise."""
    height, width, _ = FRAME_SHAPES[kind]
    rows, columns = np.mgrid[:height, :width]
    waves = np.stack([np.sin(columns / 7 + c) + np.cos(rows / 5 * (c + 1)) for c in range(3)], axis=-1) * 50 + 128
    return np.clip(waves + 8 * uniform(kind, waves.shape), 0, 255).astype(np.uint8)


def pixels() -> NDArray[np.float32]:
    """float32[2, 6, 56, 56]: what two normalised images could be."""
    return (2.0 * uniform("pixels", LAST_PIXELS)).astype(np.float32)


def token_rows() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """input_ids and attention_mask int64[2, 14]: the second row ends earlier, and is padded with 32000."""
    ids = 3 + np.floor((uniform("ids", (2, 14)) + 1) / 2 * 31000).astype(np.int64)
    ids[:, 0], ids[0, -1] = 1, 29871
    mask = np.ones((2, 14), np.int64)
    mask[1, 9:], ids[1, 9:] = 0, 32000
    return ids, mask


def logit_columns() -> NDArray[np.int64]:
    """The ids whose logits are stored: all actions, and every 251st."""
    return np.unique(np.concatenate([np.arange(0, 32064, 251), np.arange(FIRST_ACTION, END_ACTION)]))
