"""Whether data sets that are trained together agree on their cameras, on the numbers of an action, and on the time between
actions.

    a: cameras front, wrist; action x, y, gripper; 10 fps       b: cameras wrist, front: refused, unless image_keys names an order

Cameras that `data.options.image_keys` names are matched by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loader_service.sources.lerobot.info import Feature
from loader_service.sources.lerobot.meta import Columns, Meta, Wanted, choose_columns
from stoker_proto.config import DataConfig
from stoker_proto.errors import DataError


def check_alike(metas: Sequence[Meta], wanted: Wanted, config: DataConfig) -> None:
    """Raises DataError with the first difference from the first data set, and the way out."""
    if len(metas) < 2:
        return
    first = metas[0]
    columns = choose_columns(first.info, wanted)
    for other in metas[1:]:
        for field, reason in _differences(first, columns, other, wanted, config):
            raise DataError(f"{reason}; both are trained together", file=other.info.file, field=field)


def _differences(
    first: Meta, columns: Columns, other: Meta, wanted: Wanted, config: DataConfig
) -> Iterator[tuple[str, str]]:
    """(field, reason)."""
    others, file = choose_columns(other.info, wanted), first.info.file
    names, found = ([camera.key for camera in of.cameras] for of in (columns, others))
    if names != found:
        common = [name for name in names if name in found]
        way_out = f"name those to read in data.options.image_keys, e.g. [{', '.join(common)}]" if common else _APART
        yield "features", f"cameras {', '.join(found)}, and {file} has {', '.join(names)}: {way_out}"
    yield from _vectors(columns.action, others.action, file)
    if config.state == "text" and columns.state is not None and others.state is not None:
        yield from _vectors(columns.state, others.state, file)
    if config.state == "text" and (columns.state is None) != (others.state is None):
        yield "features", f"a state in one of it and {file}: name it in data.options.state_key, or {_APART}"
    fps, own = first.info.fps, other.info.fps
    if own != fps and config.action.chunk > 1 and wanted.options.action_delta_timestamps is None:
        yield (
            "fps",
            f"{own:g}, and {file} has {fps:g}: {config.action.chunk} actions take another time; set "
            f"data.options.action_delta_timestamps, or {_APART}",
        )


_APART = "make each a source of its own, with its own options (data.sources)"


def _vectors(a: Feature, b: Feature, file: str) -> Iterator[tuple[str, str]]:
    """Numbers are known by their names where both data sets have them, else by their count."""
    field = f"features[{b.key}]"
    if a.shape != b.shape:
        yield field, f"shape {list(b.shape)}, and {file} has {list(a.shape)}: {_APART}"
    elif a.names and b.names and a.names != b.names:
        at = next(i for i, pair in enumerate(zip(a.names, b.names, strict=False)) if pair[0] != pair[1])
        yield (
            f"{field}.names[{at}]",
            f"{b.names[at]}, and {file} has {a.names[at]} there: write the numbers in one order",
        )
