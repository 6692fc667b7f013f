"""A trained policy on recorded frames: `python -m trainer.examples.predictions --model EXPORT --data val.jsonl --out sheet.png`.

Each row of the sheet is one trajectory. A white arrow is the recorded translation, a red one the predicted translation, both from
where the hand is. The policy sees what it was trained on: frame, instruction, state. It acts on its own tokens.

The data are a JSONL file and NPZ files as `trainer.sim.collect` writes them; the arrows need their camera matrices.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from stoker_proto.errors import StokerError
from stoker_proto.host.files import whole_file
from stoker_proto.images.views import HAND_SHAPES
from trainer.policy import Policy, PolicyInput

TILE, COLUMNS, TITLE = 192, 6, 16
"""Side of one picture, pictures of one trajectory, height of its title; pixels."""
METRES = 0.1
"""What a translation of 1 is: an arrow is as long as the movement."""


@dataclass(frozen=True)
class Trajectory:
    """One recorded trajectory of T frames."""

    instruction: str
    arrays: Mapping[str, NDArray[Any]]
    """`rgb` uint8[T, H, W, 3], `state` float32[T, S], and the hand and camera of `HAND_SHAPES`."""
    actions: NDArray[np.float32]
    """float32[T, 7]."""

    def inputs(self) -> list[PolicyInput]:
        """What the policy is told at each frame."""
        return [
            PolicyInput(
                images=[frame],
                instruction=self.instruction,
                state=self.arrays["state"][t],
                measurements={name: self.arrays[name][t] for name in HAND_SHAPES},
            )
            for t, frame in enumerate(self.arrays["rgb"])
        ]

    def pixel(self, point: NDArray[np.floating[Any]], t: int) -> tuple[float, float]:
        """Column and row of a point float[3] (metres, world frame) in frame t, enlarged to a tile."""
        u, v, w = self.arrays["intrinsic_cv"][t] @ self.arrays["extrinsic_cv"][t] @ np.append(point, 1.0)
        return u / w * TILE / self.arrays["rgb"].shape[2], v / w * TILE / self.arrays["rgb"].shape[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the sheet, and print the mean error beside that of the best constant action. Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="an export or a checkpoint of a run")
    parser.add_argument("--data", type=Path, required=True, help="JSONL file of the collector")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    options = parser.parse_args(argv)
    try:
        _predict(options.model, options.data, options.out)
    except (StokerError, OSError) as error:
        print(f"predictions: {error}", file=sys.stderr)
        return 1
    return 0


def _predict(model: Path, data: Path, out: Path) -> None:
    policy = Policy.load(model)
    trajectories = read(data)
    predicted = [policy.act_batch(trajectory.inputs())[:, 0] for trajectory in trajectories]
    recorded = np.concatenate([trajectory.actions for trajectory in trajectories])
    error = float(np.abs(np.concatenate(predicted) - recorded).mean())
    constant = float(np.abs(np.median(recorded, axis=0) - recorded).mean())
    rows = [draw(trajectory, actions) for trajectory, actions in zip(trajectories, predicted, strict=True)]
    sheet = Image.fromarray(np.concatenate(rows))
    with whole_file(out) as unfinished:
        sheet.save(unfinished, format="PNG")
    print(
        f"{len(recorded)} recorded frames: mean action error {error:.4f}; that of the best constant action is {constant:.4f}\n"
        f"{out}"
    )


def read(path: Path) -> list[Trajectory]:
    """All trajectories of a JSONL file of the collector."""
    found = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        with np.load(path.parent / row["obs_path"]) as arrays:
            found.append(
                Trajectory(
                    row["instruction"], {name: arrays[name] for name in arrays}, np.asarray(row["actions"], np.float32)
                )
            )
    return found


def draw(trajectory: Trajectory, predicted: NDArray[np.float32]) -> NDArray[np.uint8]:
    """uint8[TITLE + TILE, COLUMNS x TILE, 3]: equally spaced frames with both arrows. predicted: float32[T, 7]."""
    row = Image.new("RGB", (COLUMNS * TILE, TITLE + TILE))
    ImageDraw.Draw(row).text((3, 2), f"{trajectory.instruction}    white: recorded, red: predicted", fill="white")
    frames = trajectory.arrays["rgb"]
    for column, t in enumerate(np.linspace(0, len(frames) - 1, min(COLUMNS, len(frames))).round().astype(int)):
        tile = Image.fromarray(frames[t]).resize((TILE, TILE))
        hand = trajectory.arrays["tcp_pose"][t][:3]
        for action, colour, width in ((trajectory.actions[t], "white", 5), (predicted[t], "red", 2)):
            ends = [trajectory.pixel(hand + share * METRES * action[:3], t) for share in (0, 1)]
            ImageDraw.Draw(tile).line(ends, fill=colour, width=width)
            column_end, row_end = ends[1]
            box = (column_end - width - 1, row_end - width - 1, column_end + width + 1, row_end + width + 1)
            ImageDraw.Draw(tile).ellipse(box, fill=colour)
        row.paste(tile, (column * TILE, TITLE))
    return np.asarray(row)


if __name__ == "__main__":
    sys.exit(main())
