"""Frames of an mp4 by number, in one pass: seek to the keyframe before the first, then decode on.

A frame's number is round((pts - the stream's start) * fps): 0 for the first of the file, and one more for each that follows. That
is checked frame by frame, so that a stream at another rate cannot give frames of another moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loader_service.sources.lerobot.extras import library
from stoker_proto.errors import DataError

_RATE_TOLERANCE = 0.01


def video_frames(path: str, wanted: Sequence[int], *, fps: float, size: tuple[int, int]) -> Iterator[NDArray[np.uint8]]:
    """uint8[H, W, 3] of each of the frames numbers `wanted` (never falling), one alive at a time.

    Raises DataError: no mp4 video, another size or rate than info.json says, too few frames, damaged.
    """
    if not len(wanted):
        return
    with _decoding(path):
        container = library("av").open(path, format="mp4", metadata_errors="replace")
    with container, _decoding(path):
        stream = _video_stream(container, path, fps, size)
        if stream.frames and wanted[-1] >= stream.frames:
            raise DataError(
                f"{stream.frames} frames, and frame {wanted[-1]} is wanted: the video is too short", file=path
            )
        yield from _convert(_from_frame(container, stream, wanted[0], fps, path), wanted, size, path)


def _video_stream(container: Any, path: str, fps: float, size: tuple[int, int]) -> Any:
    if not container.streams.video:
        raise DataError("no video stream in it", file=path)
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise DataError("a codec that this build of av cannot decode", file=path)
    found = (stream.height, stream.width)
    if found != size:
        raise DataError(
            f"{found[0]}x{found[1]} pixels (height x width), and info.json says {size[0]}x{size[1]}", file=path
        )
    rate = float(stream.average_rate or 0)
    if abs(rate - fps) > _RATE_TOLERANCE * fps:
        raise DataError(f"{rate:g} frames per second, and info.json says {fps:g}", file=path, field="fps")
    stream.codec_context.thread_count = 1  # the loader has threads of its own
    return stream


def _from_frame(container: Any, stream: Any, first: int, fps: float, path: str) -> Iterator[tuple[int, Any]]:
    """(number, frame) from a keyframe at or before `first` on."""
    start = stream.start_time or 0
    numbers_per_tick = float(stream.time_base) * fps
    for target in dict.fromkeys((first, 0)):
        if target or first:
            container.seek(start + round(target / numbers_per_tick), stream=stream)
        number: int | None = None
        before: int | None
        for frame in container.decode(stream):
            if frame.pts is None:
                raise DataError("a frame without a time stamp", file=path)
            before, number = number, round((frame.pts - start) * numbers_per_tick)
            if before is None and number > first:
                break  # the container's index led behind it: once more, from the file's beginning
            if before is not None and number != before + 1:
                raise DataError(
                    f"frame {number} comes after frame {before} at {fps:g} frames per second: the stream has another rate than "
                    "info.json says, or gaps",
                    file=path,
                    field="fps",
                )
            yield number, frame
        else:
            return
    raise DataError(f"no frame at or before number {first}", file=path)


def _convert(
    frames: Iterator[tuple[int, Any]], wanted: Sequence[int], size: tuple[int, int], path: str
) -> Iterator[NDArray[np.uint8]]:
    reformatter = library("av.video.reformatter").VideoReformatter()  # one for all frames: it keeps its tables
    number, frame = -1, None
    for target in wanted:
        if target < number:
            raise DataError(
                f"frame {target} is wanted after frame {number}: timestamps go back", file=path, field="timestamp"
            )
        while number < target:
            number, frame = next(frames, (target, None))
        if frame is None:
            raise DataError(f"it ends before frame {target}: the video is too short, or cut off", file=path)
        if frame.is_corrupt or (frame.height, frame.width) != size:
            raise DataError("a damaged frame, or one of another size", file=path, record=f"frame {number}")
        # Not kept here: what the caller lets go of is the memory of the next frame. Rows may be padded.
        yield np.ascontiguousarray(reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray())


@contextmanager
def _decoding(path: str) -> Iterator[None]:
    try:
        yield
    except library("av").FFmpegError as error:
        raise DataError(f"the video cannot be read ({error.strerror})", file=path) from error
