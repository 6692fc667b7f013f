"""Frames: black, of one colour, frozen, of several sizes. Blur is not judged: a wall in focus looks like a blurred one."""

from __future__ import annotations

from collections.abc import Iterator

from loader_service.doctor.facts import CameraFacts, Examined
from loader_service.doctor.finding import Finding

_MANY = 0.5
_FEWEST = 5
"""Frames of an episode from which it can be said that nothing moves."""


def constant_frames(examined: Examined) -> Iterator[Finding]:
    """Warning: over half of a record's frames are black, or of one colour."""
    for file, place, camera in _cameras(examined):
        share = camera.num_constant / camera.num_frames
        if share > _MANY:
            what = "black" if camera.num_black == camera.num_constant else "of one colour"
            problem = f"{camera.num_constant} of {camera.num_frames} frames are {what}"
            way_out = "check the camera; leave the record or the camera out"
            yield Finding("warning", "constant_frames", file, place, problem, way_out)


def frozen_frames(examined: Examined) -> Iterator[Finding]:
    """Warning: all frames of a record are the same one, and it has several."""
    for file, place, camera in _cameras(examined):
        if camera.num_frames >= _FEWEST and camera.num_repeated == camera.num_frames - 1 > 0:
            if camera.num_constant == camera.num_frames:
                continue  # `constant_frames` says it
            problem = f"all {camera.num_frames} frames are equal"
            yield Finding("warning", "frozen_frames", file, place, problem, "check the camera; leave the record out")


def frame_sizes(examined: Examined) -> Iterator[Finding]:
    """Warning: one camera with frames of several sizes. Note: cameras that differ in size."""
    for entry in examined.entries:
        if entry.dataset.is_text:
            continue  # images of dialogues have sizes of their own
        sizes: dict[int, set[tuple[int, int]]] = {}
        for record in entry.records:
            for number, camera in enumerate(record.cameras):
                sizes.setdefault(number, set()).update(camera.sizes)
        for number, found in sizes.items():
            if len(found) > 1:
                problem = f"frames of the sizes {_shown(found)} (height x width)"
                way_out = "check that all records are of one camera, in one position"
                yield Finding("warning", "frame_sizes", entry.path, f"image {number}", problem, way_out)
        if len({frozenset(found) for found in sizes.values()}) > 1 and all(len(found) == 1 for found in sizes.values()):
            problem = "; ".join(f"image {number} {_shown(found)}" for number, found in sizes.items())
            way_out = "each is resized to the model's size: check that no side of the wider ones is cut off"
            yield Finding("note", "frame_sizes", entry.path, "", f"cameras differ in size: {problem}", way_out)


def camera_counts(examined: Examined) -> Iterator[Finding]:
    """Warning: records of one entry with different numbers of images."""
    for entry in examined.entries:
        counts = {len(record.cameras): record.record for record in entry.records}
        if len(counts) > 1 and not entry.dataset.is_text:
            problem = ", ".join(f"record {record} has {count} images" for count, record in sorted(counts.items()))
            way_out = "leave out the records without all cameras, or name the cameras that all have"
            yield Finding("warning", "camera_counts", entry.path, "", problem, way_out)


def _shown(sizes: set[tuple[int, int]]) -> str:
    return ", ".join(f"{height}x{width}" for height, width in sorted(sizes))


def _cameras(examined: Examined) -> Iterator[tuple[str, str, CameraFacts]]:
    """(file, place, camera) of each camera of each record."""
    for _, record in examined.records():
        for number, camera in enumerate(record.cameras):
            if camera.num_frames:
                yield record.file, f"record {record.record}, image {number}", camera
