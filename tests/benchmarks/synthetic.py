"""Synthetic "Open-PI" trajectories that cost what rendered ones cost: smooth backgrounds, texture, moving objects."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def rendered_frames(rng: np.random.Generator, count: int, size: int) -> NDArray[np.uint8]:
    """uint8[count, size, size, 3]: a lit table with some texture, and three boxes that move over it."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    light = 140 + 60 * (1 - y) + 20 * np.sin(5 * x + rng.uniform(0, 6))
    texture = rng.normal(0, 2.0, (size, size)).astype(np.float32)
    base = np.stack([light + texture, 0.95 * light + texture, 0.85 * light + texture], -1)
    boxes = [
        (rng.uniform(0.1, 0.7, 2), rng.uniform(-0.2, 0.2, 2), rng.uniform(0.08, 0.2), rng.uniform(30, 230, 3))
        for _ in range(3)
    ]
    frames = np.empty((count, size, size, 3), np.uint8)
    for t in range(count):
        frame = base.copy()
        for place, speed, width, colour in boxes:
            left, top = ((place + speed * t / count) * size).astype(int)
            edge = int(width * size)
            frame[top : top + edge, left : left + edge] = colour + texture[top : top + edge, left : left + edge, None]
        frames[t] = np.clip(frame, 0, 255)
    return frames


def write_trajectories(
    folder: Path, *, num: int, length: int, size: int, deflated: bool, seed: int = 0, name: str = "train"
) -> Path:
    """`{name}.jsonl` and its NPZ files; the JSONL's path."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    jsonl = folder / f"{name}.jsonl"
    with jsonl.open("w") as lines:
        for i in range(num):
            relative = f"{name}/traj_{i:06d}/obs.npz"
            path = folder / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            frames = rendered_frames(rng, length, size)
            save = np.savez_compressed if deflated else np.savez
            save(path, rgb=frames)
            steps = np.cumsum(rng.normal(0, 0.1, (length, 7)), 0).clip(-1, 1)
            steps[:, 6] = np.where(np.arange(length) < length // 2, 1.0, -1.0)
            row = {"obs_path": relative, "task": "PickCube-v1", "instruction": f"move box {i % 7}"}
            lines.write(json.dumps({**row, "actions": np.round(steps, 6).tolist()}) + "\n")
    return jsonl
