"""The files that the rows read: made once, kept below the work folder."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path[1:1] = [str(HERE.parent), str(ROOT), str(ROOT / "proto")]

from loader_cost import environment, write_config  # noqa: E402 - found through the line above
from synthetic import write_trajectories  # noqa: E402

LENGTH, SIZE = 50, 256
NPZ, LEROBOT = "deflated NPZ", "LeRobot"


def make_data(kind: str, folder: Path, trajectories: int, *, prepared: bool) -> Mapping[str, Path]:
    """`files`: for all rows but Stoker's. prepared: also `config`, for Stoker, with its index and codec."""
    root, raw = (_trajectories if kind == NPZ else _lerobot)(folder, trajectories)
    if not prepared:
        return {"files": raw}
    model = folder / "model"
    if not model.exists():
        _tool("trainer.models.tiny", "--family", "llava", "--image-size", str(SIZE), "--out", str(model))
    config = write_config(root, model, raw, "base64")
    if kind == LEROBOT:
        config.write_text(config.read_text().replace("mani_openpi", "lerobot"))
    _tool("loader_service.cli", "prepare", "--config", str(config))
    return {"config": config, "files": raw}


def _trajectories(folder: Path, count: int) -> tuple[Path, Path]:
    root = folder / f"deflated-{count}"
    jsonl = root / "train.jsonl"
    if not jsonl.exists():
        write_trajectories(root, num=count, length=LENGTH, size=SIZE, deflated=True)
    return root, jsonl


def _lerobot(folder: Path, count: int) -> tuple[Path, Path]:
    """Two cameras, AV1 with a keyframe every other frame: LeRobot's own settings."""
    from lerobot_cost import make_data

    root = make_data(argparse.Namespace(folder=folder, episodes=count, size=SIZE), "libsvtav1")
    return root, root


def _tool(module: str, *options: str) -> None:
    command = [sys.executable, "-m", module, *options]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{module} ended with {done.returncode}:\n{done.stderr[-2000:]}")
