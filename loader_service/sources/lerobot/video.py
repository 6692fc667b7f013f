"""An episode's frames in an mp4, in one pass: seek to a keyframe before the first of them, then decode on.

The first is found by time, those that follow are counted: the k-th must be k / fps seconds after it, so that a stream at another
rate cannot give frames of another moment. Counting from the file's beginning would be wrong: where episodes were encoded
separately and joined, each join may shift the time stamps, and the from_timestamp of later episodes, by a part of a frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loader_service.sources.extras import library
from stoker_proto.errors import DataError
from stoker_proto.host.trouble import check_host

_RATE_TOLERANCE = 0.01
_TOLERANCE = 0.25
"""Largest error of the first frame's time, in frames; the same as for timestamps of the table (`columns`)."""
_STEPS_BACK = (0, 4, 16)
"""Frames before the first at which a keyframe is looked for, one after another. An mp4 is sought by the time of decoding, which
runs ahead of that of showing where there are B-frames: mostly by 1 to 3 frames, in h264 and hevc by 16 at most."""
_REMEDY = "write the episode's from_timestamp anew, from the time stamps in the video, or leave it out (data.options.episodes)"
_MOST_WAITING = 64
"""Packets that wait for their frame; decoders hold back 16 frames at most, and one per thread."""
_BEGINNING = -(1 << 40)
"""Ticks: before every frame, times of decoding below zero included."""


@dataclass(frozen=True, slots=True)
class Begin:
    """Where an episode begins in its file, twice: the two must agree."""

    seconds: float
    """From the file's first frame on."""
    frames_before: int
    """Of the episodes before it."""
    frames_in_file: int
    """Frames of all episodes in the file. In a file with another number of frames, frames are not counted."""


def video_frames(
    path: str, wanted: Sequence[int], *, begin: Begin, fps: float, size: tuple[int, int]
) -> Iterator[NDArray[np.uint8]]:
    """uint8[H, W, 3] of each of the episode's frames `wanted` (never falling), one alive at a time.

    Raises DataError: no mp4 video, another size or rate than info.json says, no frame at that time, too few frames, damaged.
    """
    if not len(wanted):
        return
    with _decoding(path):
        container = library("av").open(path, format="mp4", metadata_errors="replace")
    with container, _decoding(path):
        stream = _video_stream(container, path, fps, size)
        frames = _from_number(container, stream, wanted[0], begin, fps, path)
        yield from _convert(frames, wanted, size, path)


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


def _from_number(
    container: Any, stream: Any, first: int, begin: Begin, fps: float, path: str
) -> Iterator[tuple[int, Any]]:
    """(number in the episode, frame) from `first` on: found by time, then counted."""
    expected = begin.seconds * fps + first
    origin: float | None = None
    number, nearest = first - 1, -math.inf
    for moment, frame, dts in _from_keyframe(container, stream, expected, fps, path):
        if origin is None:
            off = moment - expected
            if off < -_TOLERANCE:
                nearest = off
                continue
            if off > _TOLERANCE:
                raise _no_frame(first, expected, min(nearest, off, key=abs), fps, path)
            _check_count(stream, frame, dts, begin, first, moment, fps, path)
            origin = moment
        before, number = number, first + round(moment - origin)
        if number != before + 1:
            raise DataError(
                f"frame {number} of the episode comes after frame {before} at {fps:g} frames per second: the stream has another "
                "rate than info.json says, or gaps",
                file=path,
                field="fps",
            )
        yield number, frame


def _from_keyframe(
    container: Any, stream: Any, expected: float, fps: float, path: str
) -> Iterator[tuple[float, Any, int | None]]:
    """(moment, frame, its dts) from a keyframe on that is not after `expected`, or from the file's beginning on.

    Moments are in frames after the file's first: (pts - start) * fps.
    """
    start = stream.start_time or 0
    frames_per_tick = float(stream.time_base) * fps
    latest = expected + _TOLERANCE
    places = [latest - back for back in _STEPS_BACK if latest - back >= 1]
    for place in (*places, None):
        if place is not None:
            container.seek(start + round(place / frames_per_tick), stream=stream)
        elif places:  # a file that was just opened is there already
            container.seek(_BEGINNING, stream=stream)
        is_first = True
        for frame, dts in _decode(container, stream):
            if frame.pts is None:
                raise DataError("a frame without a time stamp", file=path)
            moment = (frame.pts - start) * frames_per_tick
            if is_first and moment > latest and place is not None:
                break  # a keyframe that is decoded before the wanted frame, and shown after it
            is_first = False
            yield moment, frame, dts
        else:
            return


def _decode(container: Any, stream: Any) -> Iterator[tuple[Any, int | None]]:
    """Each frame with the dts of its own packet; the frame's dts is that of the packet after which it came out."""
    waiting: dict[int | None, int | None] = {}
    for packet in container.demux(stream):
        waiting[packet.pts] = packet.dts
        if len(waiting) > _MOST_WAITING:  # of packets that gave no frame
            del waiting[next(iter(waiting))]
        for frame in packet.decode():
            yield frame, waiting.pop(frame.pts, None)


def _check_count(
    stream: Any, frame: Any, dts: int | None, begin: Begin, first: int, moment: float, fps: float, path: str
) -> None:
    """The first frame that is wanted, where time stamps may be off by a whole frame: nothing else tells it from the next one.

    Before a keyframe lies all that is shown before it. (Where frames shown before it follow it, the one counted is the last of
    these, and no keyframe.) Other frames are told by time: in one encoding, decoding runs ahead of showing by as much for all.
    """
    index, number = stream.index_entries, begin.frames_before + first
    if len(index) != begin.frames_in_file or not index[number].is_keyframe:
        return
    if frame.key_frame and dts is not None:
        off: float = index.search_timestamp(dts, any_frame=True) - number
    else:
        off = moment - (index[number].timestamp - index[0].timestamp) * float(stream.time_base) * fps
    if abs(off) > 0.5:
        raise DataError(
            f"frame {first} of the episode is by its from_timestamp {off:+.2f} frames from frame {number} of the file, which it "
            f"is by the lengths of the episodes before: {_REMEDY}",
            file=path,
            field="from_timestamp",
        )


def _no_frame(first: int, expected: float, off: float, fps: float, path: str) -> DataError:
    return DataError(
        f"frame {first} of the episode is expected {expected / fps:.7g} s after the file's first (from_timestamp + timestamp), "
        f"and the nearest one is {off:+.2f} frames ({off / fps:+.3g} s) off; {_TOLERANCE} of a frame is allowed: {_REMEDY}",
        file=path,
        field="from_timestamp",
    )


def _convert(
    frames: Iterator[tuple[int, Any]], wanted: Sequence[int], size: tuple[int, int], path: str
) -> Iterator[NDArray[np.uint8]]:
    reformatter = library("av.video.reformatter").VideoReformatter()  # one for all frames: it keeps its tables
    number, frame = -1, None
    for target in wanted:
        while number < target:
            number, frame = next(frames, (target, None))
        if frame is None:
            raise DataError(
                f"it ends before frame {target} of the episode: the video is too short, or cut off", file=path
            )
        if frame.is_corrupt or (frame.height, frame.width) != size:
            raise DataError("a damaged frame, or one of another size", file=path, record=f"frame {number}")
        # Not kept here: what the caller lets go of is the memory of the next frame. Rows may be padded.
        yield np.ascontiguousarray(reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray())


@contextmanager
def _decoding(path: str) -> Iterator[None]:
    try:
        yield
    except library("av").FFmpegError as error:
        check_host(error, path)
        raise DataError(f"the video cannot be read ({error.strerror})", file=path) from error
