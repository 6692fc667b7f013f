"""LeRobot data sets: what samples do not hold: timestamps in the files, frames of a video, statistics.

A timestamp that would mean another frame is an error of the source itself, when it reads the episode.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from loader_service.doctor.facts import EntryFacts, Examined
from loader_service.doctor.finding import Finding, of_error
from loader_service.paths import resolve_inside
from loader_service.sources.extras import library
from loader_service.sources.lerobot.dataset import LeRobotDataset
from loader_service.sources.lerobot.meta import Meta, find_root, load_meta
from loader_service.sources.lerobot.rows import RowReader
from stoker_proto.errors import DataError
from stoker_proto.host.trouble import check_host

_TOLERANCE_S = 1e-4
"""lerobot's own."""
_MOST_VIDEOS = 16
"""Videos of a data set whose frames are counted."""


def timestamps(examined: Examined) -> Iterator[Finding]:
    """Warning: timestamps that do not rise, or lie off the grid of fps by more than lerobot's tolerance."""
    reader = RowReader()
    for _, meta, records in _folders(examined):
        off, backwards = [], []
        for file, record, start, size in records:
            stop = min(start + size, reader.num_rows(file))
            column = reader.read(file, start, stop, ["timestamp"]).column("timestamp").to_numpy().astype(np.float64)
            if len(np.flatnonzero(np.diff(column) <= 0)):
                backwards.append((file, record))
            error = np.abs(column - np.arange(len(column)) / meta.info.fps)
            slack = _TOLERANCE_S + 1e-6 * np.abs(column)  # float32 in the file
            if (error > slack).any():
                off.append((file, record, float(error.max())))
        if backwards:
            file, record = backwards[0]
            problem = f"timestamps that do not rise in {len(backwards)} of {len(records)} sampled episodes"
            yield Finding(
                "error", "timestamps", str(file), f"record {record}", problem, "write them in order of frames"
            )
        if off:
            file, record, most = max(off, key=lambda place: place[2])
            problem = (
                f"timestamps up to {most:.4g} s off the grid of fps {meta.info.fps:g} in {len(off)} of {len(records)} sampled "
                f"episodes; lerobot refuses more than {_TOLERANCE_S:g} s"
            )
            yield Finding(
                "warning",
                "timestamps",
                str(file),
                f"record {record}",
                problem,
                "write frame_index / fps, or check fps in meta/info.json",
            )


def brief_episodes(examined: Examined) -> Iterator[Finding]:
    """Warning: episodes of less than a second."""
    for _, meta, _ in _folders(examined):
        table = meta.episodes
        found = np.flatnonzero(table.length < meta.info.fps)
        if len(found):
            first = found[0]
            first_one = f"episode {table.index[first]} of {table.length[first]} frames"
            problem = (
                f"{len(found):,} of {len(table.length):,} episodes are shorter than a second (fps {meta.info.fps:g}), "
                f"the first is {first_one}"
            )
            way_out = "check their recordings; leave them out if they are fragments"
            yield Finding("warning", "brief_episodes", str(meta.info.root), "", problem, way_out)


def video_frames(examined: Examined) -> Iterator[Finding]:
    """Warning: a video with another number of frames than its episodes have rows. Error: one that cannot be opened."""
    for entry, meta, _ in _folders(examined):
        for file, rows in list(_videos(entry, meta))[:_MOST_VIDEOS]:
            try:
                found = _count(file)
            except DataError as error:
                yield of_error(error, "video_frames")
                continue
            if found != rows:
                problem = f"{found} frames, and its episodes have {rows} rows"
                way_out = "encode the video again, or correct the lengths in meta/"
                yield Finding("warning", "video_frames", str(file), "", problem, way_out)


def published_statistics(examined: Examined) -> Iterator[Finding]:
    """Note: no meta/stats.json. Stoker computes its own; lerobot needs the file."""
    for _, meta, _ in _folders(examined):
        if not (meta.info.root / "meta/stats.json").is_file():
            problem = "no meta/stats.json: Stoker computes the statistics itself, and other programs may need the file"
            yield Finding("note", "published_statistics", str(meta.info.root), "", problem, "")


def _folders(examined: Examined) -> Iterator[tuple[EntryFacts, Meta, list[tuple[Path, int, int, int]]]]:
    """(entry, index, [(file, record, first row, rows)]) of each local data set of which records were read."""
    for entry in examined.entries:
        if not isinstance(entry.dataset, LeRobotDataset) or entry.manifest is None or entry.manifest.stamps == ():
            continue
        roots: dict[Path, list[tuple[Path, int, int, int]]] = {}
        for record in entry.records:
            place = (Path(record.file), record.record, record.offset, record.size)
            roots.setdefault(find_root(place[0]), []).append(place)
        for root, places in roots.items():
            yield entry, load_meta(root, entry.dataset.wanted), places


def _videos(entry: EntryFacts, meta: Meta) -> Iterator[tuple[Path, int]]:
    """(file, rows of all its episodes), each once, first and last episodes first."""
    info = meta.info
    seen: set[tuple[str, int, int]] = set()
    for key, places in meta.episodes.videos.items():
        numbers = range(len(meta.episodes.index))
        for row in dict.fromkeys([*numbers[:1], *numbers[-1:], *numbers]):
            chunk, number = int(places.chunk[row]), int(places.file[row])
            if (key, chunk, number) in seen or len(seen) >= _MOST_VIDEOS:
                continue
            seen.add((key, chunk, number))
            name = info.video_file(key, chunk, number)
            root = entry.dataset.root_of(Path(info.file)) or str(info.root)
            yield (
                Path(resolve_inside(name, base=str(info.root), root=root, field="video_path")),
                int(places.frames_in_file[row]),
            )


def _count(file: Path) -> int:
    """Frames of the video: packets, without decoding them. Raises DataError."""
    av = library("av")
    try:
        with av.open(str(file)) as container:
            return sum(1 for packet in container.demux(container.streams.video[0]) if packet.size)
    except (OSError, ValueError, IndexError, av.error.FFmpegError) as error:
        check_host(error, str(file))
        raise DataError(f"the video cannot be read ({error}): copy it again", file=str(file)) from error
