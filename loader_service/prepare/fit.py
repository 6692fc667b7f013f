"""Statistics and codec of all train entries together: fitted once, cached under the data's content and the codec's settings."""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loader_service.cache_folder import LOCK_DEADLINE_S, locked, writable
from loader_service.manifest import ACTIONS_FILE, FORMAT_VERSION, STATES_FILE, EntryManifest
from loader_service.prepare.actions_state import SAMPLE_CAPACITY, GatheredActions, check_same_width, sampled_chunk
from loader_service.prepare.cleanup import note_use
from loader_service.prepare.mask import Names, check_in_range, derived_mask, named_mask
from loader_service.prepare.published import published_mask, published_statistics
from loader_service.prepare.statistics_check import check_clamped
from stoker_proto.actions import ActionCodec, ActionStatistics, fit_codec, load_codec, save_codec
from stoker_proto.config import ActionConfig
from stoker_proto.errors import ConfigError, DataError, ManifestError
from stoker_proto.hashing import fingerprint
from stoker_proto.host.trouble import check_host

logger = logging.getLogger(__name__)


def given_codec(action: ActionConfig) -> ActionCodec:
    """The codec of data.action.codec_path. Raises ConfigError if it is not of the kind that the config asks for."""
    path = action.codec_path or ""
    try:
        codec = load_codec(path)
    except DataError as error:
        raise ConfigError(f"data.action.codec_path: {error}") from error
    if (codec.name, codec.chunk) != (action.codec, action.chunk):
        raise ConfigError(
            f"data.action.codec_path {path} is a {codec.name} codec of chunks of {codec.chunk}, and the config asks for "
            f"codec {action.codec} and chunk {action.chunk}: name another file, or set data.action.codec and "
            "data.action.chunk as the file has them"
        )
    return codec


def fitted_codec(
    train: Sequence[EntryManifest],
    action: ActionConfig,
    root: Path,
    keys: Collection[str] = ("action",),
    names: Collection[Names] = (),
    lock_deadline_s: float = LOCK_DEADLINE_S,
) -> ActionCodec | None:
    """The codec of all train entries, from the cache folder or fitted and put there; None if there are no actions.

    Of loaders that start together, one fits under the folder's lock, and the others use the result.
    keys: names of the actions in published statistics (`BaseSFTDataset.action_key`); names: of the dimensions of an action
    (`BaseSFTDataset.action_names`). Raises ConfigError where the statistics do not fit the data.
    """
    if all(entry.statistics is None for entry in train):
        return None
    if action.statistics_path is not None:
        _check_one_key(action.statistics_path, keys)
    mask = action_mask(train, action, next(iter(keys), "action"), names)
    unmasked = np.flatnonzero(~mask).tolist()
    settings: list[Any] = [action.codec, action.chunk, action.codec_options, unmasked, action.most_clamped]
    given = None
    if action.statistics_path is not None:
        given = published_statistics(action.statistics_path, mask, next(iter(keys)))
        settings.append(given.to_json())
    key = fingerprint([FORMAT_VERSION, [entry.content for entry in train], settings])[:32]
    path = root / "codecs" / f"{key}.json"
    found = _kept(path)
    if found is not None:
        return found
    with locked(root, lock_deadline_s):
        found = _kept(path)
        if found is not None:
            return found
        own, sample = train_actions(train, action)
        statistics = _own_statistics(own, mask, action) if given is None else given
        codec = fit_codec(action.codec, sample, statistics, chunk=action.chunk, **action.codec_options)
        check_clamped(codec, sample, own, action)
        with writable(root):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_codec(codec, path)
        return codec


def _kept(path: Path) -> ActionCodec | None:
    if not path.exists():
        return None
    try:
        codec = load_codec(path)
    except DataError as error:
        logger.warning("%s: it is fitted again", error)
        return None
    note_use(path)
    return codec


def _own_statistics(own: ActionStatistics, mask: NDArray[np.bool_], action: ActionConfig) -> ActionStatistics:
    """Those of the data, with this mask. `vq` and `fast` find the range of a dimension that hardly moves on their own."""
    masked = replace(own, mask=mask)
    return masked.widened() if action.codec == "bins" else masked


def _check_one_key(path: str, keys: Collection[str]) -> None:
    if len(keys) > 1:
        raise ConfigError(
            f"data.action.statistics_path {path}: the sources' actions are {', '.join(sorted(keys))}, and it "
            "is the statistics of one: leave the key out to take those of the data"
        )


def action_mask(
    train: Sequence[EntryManifest], action: ActionConfig, key: str, names: Collection[Names]
) -> NDArray[np.bool_]:
    """bool[D]: which dimensions are normalised. Some entry has actions.

    data.action.unmasked decides; without it the mask of published statistics; without one the data and its names.
    """
    known = [entry.statistics for entry in train if entry.statistics is not None]
    dim = known[0].dim
    known = [statistics for statistics in known if statistics.dim == dim]  # a different width is refused by the merge
    low, high = (np.min([one.min for one in known], axis=0), np.max([one.max for one in known], axis=0))
    if action.unmasked is not None:
        return named_mask(low, high, action.unmasked)
    path = action.statistics_path
    mask = None if path is None else published_mask(path, dim, key)
    if mask is None:
        return derived_mask(low, high, [one for one in names if len(one) == dim])
    who = f"data.action.statistics_path {path} has mask false in it"
    check_in_range(mask, low, high, who, "name the statistics of this data, or remove the key")
    return mask


def train_actions(train: Sequence[EntryManifest], action: ActionConfig) -> tuple[ActionStatistics, NDArray[np.float32]]:
    """Statistics of all entries together, without a mask, and the sample that the codec is fitted on. Some entry has actions.

    The sample is float32[M, D] of single actions, or float32[M, K, D] of chunks for a codec that is fitted to chunks.
    """
    with_actions = [entry for entry in train if entry.statistics is not None]
    merged = _merged(with_actions, ACTIONS_FILE, sampled_chunk(action), "actions")
    if merged is None:
        raise DataError("no train entry has actions: there is nothing to fit a codec to")
    statistics, sample = merged.statistics.finish()
    return statistics, sample if merged.chunks is None else merged.chunks.finish()


def sampled_chunks(entry: EntryManifest, action: ActionConfig) -> NDArray[np.float32] | None:
    """float32[M, K, D], a fair sample of the entry's chunks; None where the codec needs none, or the entry has no actions."""
    chunk = sampled_chunk(action)
    if chunk == 0 or entry.statistics is None:
        return None
    chunks = _load_actions(entry.folder / ACTIONS_FILE, chunk).chunks
    return None if chunks is None else chunks.finish()


def train_states(train: Sequence[EntryManifest]) -> ActionStatistics:
    """Statistics of the states of all entries together. Raises ConfigError where there are none."""
    merged = _merged([entry for entry in train if entry.states is not None], STATES_FILE, 0, "states")
    if merged is None:
        raise ConfigError("data.state is text, and the train data has no states: set data.state to none")
    return merged.statistics.finish()[0]


def given_states(path: str) -> ActionStatistics:
    """The statistics of data.state_path. Raises ConfigError."""
    try:
        return ActionStatistics.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError, DataError) as error:
        check_host(error, path)
        raise ConfigError(
            f"data.state_path is {path!r}: not what `loader-prepare --state-out FILE` writes ({error})"
        ) from error


def _merged(entries: Sequence[EntryManifest], file: str, chunk: int, what: str) -> GatheredActions | None:
    merged: GatheredActions | None = None
    for entry in entries:
        found = _load_actions(entry.folder / file, chunk)
        if merged is None:
            merged = GatheredActions.empty(found.dim, chunk)
        check_same_width([found.dim], entry.path, merged, what)
        merged.merge(found)
    return merged


def _load_actions(path: Path, chunk: int) -> GatheredActions:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            actions = GatheredActions.from_arrays(arrays, SAMPLE_CAPACITY, chunk)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, DataError) as error:
        check_host(error, str(path))
        reason = f"damaged ({type(error).__name__}): delete it and run loader-prepare again"
        raise ManifestError(reason, file=str(path)) from error
    if actions is None:
        raise ManifestError("it holds too few actions: delete it and run loader-prepare again", file=str(path))
    return actions
