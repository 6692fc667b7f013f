"""An episode's frames in an mp4, in one pass: seek to a keyframe before the first of them, then decode on.

A frame belongs to a row if its time is within `_TOLERANCE` of the row's. Time stamps of the table may be off by whole frames, so
each frame is also counted (`presentation_order`): it must have as many frames before it as the episodes before it have rows. With
`Begin.by_number`, frames are only counted, and all times are ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loader_service.sources.extras import library
from loader_service.sources.lerobot.presentation_order import ShownOrder
from loader_service.sources.lfs import refuse_pointer
from stoker_proto.errors import DataError
from stoker_proto.host.stages import DECODE, switch
from stoker_proto.host.trouble import check_host

_RATE_TOLERANCE = 0.01
_TOLERANCE = 0.25
"""Largest error of a frame's time, in frames; the same as for timestamps of the table (`columns`)."""
_STEPS_BACK = (0, 4, 16)
"""Frames before the first at which a keyframe is looked for, one after another. Seeking in an mp4 uses decoding times. With
B-frames these run ahead of presentation times: mostly by 1 to 3 frames, in h264 and hevc by 16 at most."""
_REMEDY = "write the episode's from_timestamp anew, from the time stamps in the video, or leave it out (data.options.episodes)"
_BEGINNING = -(1 << 40)
"""Ticks: before every frame, times of decoding below zero included."""

Found = tuple[float, Any, int | None]
"""(moment in frames after the file's first, frame, its number in the file)."""


@dataclass(frozen=True, slots=True)
class Begin:
    """Where an episode begins in its file, by time and by number: the two must agree."""

    seconds: float
    """From the file's first frame on."""
    frames_before: int
    """Of the episodes before it in its file."""
    frames_in_file: int
    """Frames of all episodes in the file."""
    frames_before_with_gaps: int
    """Of the episodes before it, and the whole frames that their from_timestamps leave between them. It counts in a file that has
    another number of frames than its episodes."""
    by_number: bool = False
    """Go by number alone."""


@dataclass(frozen=True, slots=True)
class _Video:
    """An open file, and what is looked for in it."""

    path: str
    container: Any
    stream: Any
    order: ShownOrder
    begin: Begin
    fps: float

    @property
    def number(self) -> int:
        """Of the episode's first frame in the file. Raises DataError where frames are counted and the counts differ."""
        begin = self.begin
        if self.order.num_frames == begin.frames_in_file:
            return begin.frames_before
        if begin.by_number and (begin.frames_before or begin.frames_before_with_gaps):
            raise DataError(
                f"{self.order.num_frames or 'an unknown number of'} frames, and its episodes have {begin.frames_in_file} rows: "
                "frames cannot be counted (data.options.match_frames: frame_index); write the video again without fragments, "
                "or use match_frames: timestamp",
                file=self.path,
            )
        return begin.frames_before_with_gaps


def video_frames(
    path: str, wanted: Sequence[int], *, begin: Begin, fps: float, size: tuple[int, int]
) -> Iterator[NDArray[np.uint8]]:
    """uint8[H, W, 3] of each of the episode's frames `wanted` (never falling), one alive at a time.

    Raises DataError: no mp4 video, another size or rate than info.json says, no frame at that time, the frame of another row, too
    few frames, damaged.
    """
    if not len(wanted):
        return
    with _decoding(path):
        container = library("av").open(path, format="mp4", metadata_errors="replace")
    with container, _decoding(path):
        stream = _video_stream(container, path, None if begin.by_number else fps, size)
        video = _Video(path, container, stream, ShownOrder(stream), begin, fps)
        frames = _counted(video, wanted[0]) if begin.by_number else _timed(video, wanted[0])
        yield from _convert(frames, wanted, size, path)


def _video_stream(container: Any, path: str, fps: float | None, size: tuple[int, int]) -> Any:
    """fps: None: any."""
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
    if fps is not None and abs(rate - fps) > _RATE_TOLERANCE * fps:
        raise DataError(f"{rate:g} frames per second, and info.json says {fps:g}", file=path, field="fps")
    stream.codec_context.thread_count = 1  # the loader has threads of its own
    return stream


def _timed(video: _Video, first: int) -> Iterator[tuple[int, Any]]:
    """(number in the episode, frame) from `first` on: each at the time of its row, and counted."""
    expected, in_file = video.begin.seconds * video.fps + first, video.number
    start, frames_per_tick = video.stream.start_time or 0, float(video.stream.time_base) * video.fps
    latest = expected + _TOLERANCE
    places = [start + round((latest - back) / frames_per_tick) for back in _STEPS_BACK if latest - back >= 1]
    before, nearest = first - 1, -math.inf
    for moment, frame, counted in _from_keyframe(video, places, lambda moment, _: moment > latest):
        off = moment - expected
        if before < first:
            if off < -_TOLERANCE:
                nearest = off
                continue
            if off > _TOLERANCE:
                raise _no_frame(video, first, expected, min(nearest, off, key=abs))
        number = first + round(off)
        if number != before + 1:
            raise DataError(
                f"frame {number} of the episode comes after frame {before} at {video.fps:g} frames per second: the stream has "
                "another rate than info.json says, or gaps",
                file=video.path,
                field="fps",
            )
        if abs(off - round(off)) > _TOLERANCE:
            raise _drifting(video, number, off - round(off))
        if counted is None:
            counted = _by_time(expected, in_file + first) + number - first
        if counted != in_file + number:
            raise _another_row(video, number, counted - in_file - number, in_file + number)
        before = number
        yield number, frame


def _by_time(expected: float, in_file: int) -> int:
    """Of a frame that cannot be counted. Joins shift times by parts of a frame; more than a half is another frame."""
    return in_file if abs(expected - in_file) <= 0.5 else round(expected)


def _counted(video: _Video, first: int) -> Iterator[tuple[int, Any]]:
    """(number in the episode, frame) from `first` on, by number alone."""
    in_file, order = video.number, video.order
    is_known = (
        order.num_frames is not None
    )  # else the episode is the first of its file, which is read from its beginning
    target = in_file + first
    places = [order.ticks_of(target - back) for back in _STEPS_BACK if target - back >= 1] if is_known else []
    expected = target
    found = _from_keyframe(video, places, lambda _, counted: counted is None or counted > target)
    for decoded, (_, frame, counted) in enumerate(found):
        number = counted if is_known else decoded
        if number is not None and number < target:
            continue
        if number != expected:
            raise DataError(
                f"frame {expected - in_file} of the episode is not where the index of the file has it: a damaged file",
                file=video.path,
            )
        yield expected - in_file, frame
        expected += 1


def _from_keyframe(
    video: _Video, places: Sequence[int], is_late: Callable[[float, int | None], bool]
) -> Iterator[Found]:
    """Frames from a keyframe on that is not late, looked for at the places (ticks), or from the file's beginning on."""
    container, stream = video.container, video.stream
    start, frames_per_tick = stream.start_time or 0, float(stream.time_base) * video.fps
    for place in (*places, None):
        if place is not None:
            container.seek(place, stream=stream)
        elif places:  # a file that was just opened is there already
            container.seek(_BEGINNING, stream=stream)
        video.order.restart()
        is_first = True
        for packet in container.demux(stream):
            video.order.read(packet)
            for frame in packet.decode():
                if frame.pts is None:
                    raise DataError("a frame without a time stamp", file=video.path)
                found = (frame.pts - start) * frames_per_tick, frame, video.order.number_of(frame.pts)
                if is_first and place is not None and is_late(found[0], found[2]):
                    break  # a keyframe that is decoded before the wanted frame, and shown after it
                is_first = False
                yield found
            else:
                continue
            break
        else:
            return


def _another_row(video: _Video, number: int, off: int, in_file: int) -> DataError:
    return DataError(
        f"frame {number} of the episode is by its from_timestamp {off:+d} frames from frame {in_file} of the file, which it "
        f"is by the lengths of the episodes before: {_REMEDY}",
        file=video.path,
        field="from_timestamp",
    )


def _no_frame(video: _Video, number: int, expected: float, off: float) -> DataError:
    return DataError(
        f"frame {number} of the episode is expected {expected / video.fps:.7g} s after the file's first (from_timestamp + "
        f"timestamp), and the nearest one is {off:+.2f} frames ({off / video.fps:+.3g} s) off; {_TOLERANCE} of a frame is "
        f"allowed: {_REMEDY}",
        file=video.path,
        field="from_timestamp",
    )


def _drifting(video: _Video, number: int, off: float) -> DataError:
    return DataError(
        f"frame {number} of the episode is {off:+.2f} frames off its time at {video.fps:g} frames per second; {_TOLERANCE} of a "
        "frame is allowed: the stream has another rate than info.json says, or its clock drifts; "
        "data.options.match_frames: frame_index goes by number instead",
        file=video.path,
        field="fps",
    )


def _convert(
    frames: Iterator[tuple[int, Any]], wanted: Sequence[int], size: tuple[int, int], path: str
) -> Iterator[NDArray[np.uint8]]:
    reformatter = library("av.video.reformatter").VideoReformatter()  # one for all frames: it keeps its tables
    number, frame = -1, None
    for target in wanted:
        before = switch(DECODE)
        while number < target:
            number, frame = next(frames, (target, None))
        if frame is None:
            raise DataError(
                f"it ends before frame {target} of the episode: the video is too short, or cut off", file=path
            )
        if frame.is_corrupt or (frame.height, frame.width) != size:
            raise DataError("a damaged frame, or one of another size", file=path, record=f"frame {number}")
        # Not kept here: what the caller lets go of is the memory of the next frame. Rows may be padded.
        yield _to_pixels(reformatter, frame, before)


def _to_pixels(reformatter: Any, frame: Any, stage: int) -> NDArray[np.uint8]:
    """uint8[H, W, 3]; the thread goes back to the stage."""
    pixels = np.ascontiguousarray(reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray())
    switch(stage)
    return pixels


@contextmanager
def _decoding(path: str) -> Iterator[None]:
    try:
        yield
    except library("av").FFmpegError as error:
        check_host(error, path)
        refuse_pointer(path)
        raise DataError(f"the video cannot be read ({error.strerror})", file=path) from error
