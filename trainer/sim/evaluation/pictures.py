"""Videos of the first successes and failures of each task, and one sheet of pictures of them all.

    OUT/videos/model_PushCube-v1_seed00000_success.mp4
    OUT/contact_sheet.png       one row per video: its first picture, then equally spaced ones, then its last

"First" is by the time at which episodes end. Only the first camera is shown. Needs PyAV, part of the extra `stoker[sim]`.
"""

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from stoker_proto.errors import ConfigError
from stoker_proto.host.files import whole_file
from trainer.sim.evaluation.episode import EpisodeResult, Job

FRAMES_PER_SECOND = 10
VIDEO_SIDE = 256
"""Smaller pictures are enlarged to about this many pixels, so that a player shows them sharply."""
_COLUMNS, _TILE, _TITLE = 8, 128, 16
"""Layout of the sheet: pictures in a row, then in pixels the side of one and the height of a row's title."""
_KEPT_FRAMES = 2000
"""Frames of one episode that are kept; a longer one is cut."""
_SHEET_ROWS = 64
"""Most rows of a sheet: the newest."""

Frames = list[NDArray[np.uint8]]


def check_video(wanted: bool) -> None:
    """Raises ConfigError if videos are wanted and cannot be written."""
    if not wanted:
        return
    try:
        importlib.import_module("av")
    except ImportError as error:
        raise ConfigError(
            f"videos need PyAV ({error}); install it with: pip install 'stoker[sim]', or pass --videos 0"
        ) from error


class Pictures:
    """Keeps the pictures of running episodes, and writes those that are wanted. A `rollout.Watcher`."""

    def __init__(self, folder: Path, label: str, per_outcome: int) -> None:
        """label: of the model. per_outcome: videos of successes, and of failures, of each task; 0: none."""
        self._folder, self._label, self._per_outcome = folder, label, per_outcome
        self._running: dict[Job, Frames] = {}

    def saw(self, job: Job, images: Sequence[NDArray[Any]]) -> None:
        """Keep the first camera's picture, while a video of the task may still be wanted."""
        if not images or all(self._count(job.task, outcome) >= self._per_outcome for outcome in ("success", "failure")):
            self._running.pop(job, None)
            return
        frames = self._running.setdefault(job, [])
        if len(frames) < _KEPT_FRAMES:
            frames.append(np.asarray(images[0], np.uint8).copy())

    def ended(self, job: Job, result: EpisodeResult | None) -> None:
        """Write the video, if it is among the first of its outcome."""
        frames = self._running.pop(job, [])
        if result is None or not frames:
            return
        outcome = "success" if result.success_once else "failure"
        if self._count(job.task, outcome) < self._per_outcome:
            name = f"{self._label}_{_file_name(job.task)}_seed{job.seed:05d}_{outcome}"
            self._folder.mkdir(parents=True, exist_ok=True)
            _row(frames, f"{name.replace('_', '  ')}   {result.steps} steps   {result.instruction}").save(
                self._folder / f"{name}.png"
            )
            with whole_file(self._folder / f"{name}.mp4") as path:
                write_video(path, frames)

    def _count(self, task: str, outcome: str) -> int:
        return len(list(self._folder.glob(f"{self._label}_{_file_name(task)}_seed*_{outcome}.mp4")))


def write_video(path: Path, frames: Sequence[NDArray[np.uint8]]) -> None:
    """Write frames uint8[H, W, 3] of one size as H.264 in an MP4, enlarged by a whole factor."""
    av = importlib.import_module("av")
    height, width = frames[0].shape[:2]
    factor = max(1, round(VIDEO_SIDE / max(height, width)))
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        # H.264 with its usual colours takes even sizes only.
        stream.width, stream.height = (side * factor // 2 * 2 for side in (width, height))
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "20", "threads": "1"}
        for frame in frames:
            large = frame.repeat(factor, axis=0).repeat(factor, axis=1)[: stream.height, : stream.width]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(large), format="rgb24")))
        container.mux(stream.encode())


def write_sheet(folder: Path, path: Path) -> bool:
    """Put the rows of all videos in the folder under each other; False if there is none."""
    rows = [Image.open(row).convert("RGB") for row in sorted(folder.glob("*.png"))[-_SHEET_ROWS:]]
    if not rows:
        return False
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)))
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    with whole_file(path) as unfinished:
        sheet.save(unfinished, format="PNG")
    return True


def _row(frames: Sequence[NDArray[np.uint8]], title: str) -> Image.Image:
    """One row of the sheet: a title, and equally spaced pictures, the first and the last among them."""
    row = Image.new("RGB", (_COLUMNS * _TILE, _TITLE + _TILE))
    ImageDraw.Draw(row).text((3, 2), title.encode("ascii", "replace").decode(), fill="white")
    chosen = np.linspace(0, len(frames) - 1, min(_COLUMNS, len(frames))).round().astype(int)
    for column, index in enumerate(chosen):
        tile = Image.fromarray(frames[index])
        scale = _TILE / max(tile.size)
        tile = tile.resize((max(1, round(tile.width * scale)), max(1, round(tile.height * scale))))
        row.paste(tile, (column * _TILE, _TITLE))
    return row


def _file_name(task: str) -> str:
    return re.sub(r"[^\w.-]", "-", task)
