"""Actions normalised by the statistics that came with the data."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loader_service.prepare.published import published_statistics
from loader_service.prepare.run import prepare
from stoker_proto.config import Config
from stoker_proto.errors import ConfigError

SHARED = Path(os.environ.get("STOKER_SHARED_DATA", Path(__file__).parents[4] / "shared" / "data"))
MASK = np.array([True, False])
ACTION: dict[str, Any] = {
    "min": [-1, 0],
    "max": [1, 1],
    "mean": [0, 0.5],
    "std": [0.5, 0.5],
    "q01": [-0.5, 0],
    "q99": [0.25, 1],
    "count": [250],
}


def write(path: Path, tree: object) -> str:
    path.write_text(json.dumps(tree))
    return str(path)


@pytest.mark.parametrize(
    "tree", [{"action": ACTION, "index": {}}, {"bridge_orig": {"action": ACTION, "num_trajectories": 3}}]
)
def test_both_layouts_are_read(tmp_path: Path, tree: object) -> None:
    found = published_statistics(write(tmp_path / "stats.json", tree), MASK)
    assert (found.count, found.q01.tolist(), found.q99.tolist()) == (250, [-0.5, 0], [0.25, 1])
    assert found.normalise(np.array([0.25, 0.7])).tolist() == pytest.approx([1, 0.7], abs=1e-6)


def test_the_actions_may_have_another_name(tmp_path: Path) -> None:
    path = write(tmp_path / "stats.json", {"action": ACTION, "action.eef": {**ACTION, "q99": [0.75, 1]}})
    assert published_statistics(path, MASK, "action.eef").q99.tolist() == [0.75, 1]
    with pytest.raises(ConfigError, match=r"it has no `action\.joints`"):
        published_statistics(path, MASK, "action.joints")


def test_the_mask_of_the_file_is_that_of_the_config(tmp_path: Path) -> None:
    def found(mask: object) -> np.ndarray:
        tree = {"bridge_orig": {"action": {**ACTION, "mask": mask}, "num_transitions": 9}}
        return published_statistics(write(tmp_path / "stats.json", tree), MASK).mask

    assert found([True, False]).tolist() == [True, False]
    with pytest.raises(ConfigError, match=r"mask leaves out .* \[\], .* is \[1\]: set data\.action\.unmasked: \[\]"):
        found([True, True])
    for wrong in ([True], "both", [1, 0]):
        with pytest.raises(ConfigError, match=r"action\.mask is .*: 2 times true or false is expected"):
            found(wrong)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([], "it has no `action`"),
        ({"a": {"action": ACTION}, "b": {"action": ACTION}}, "2 data sets have `action`"),
        ({"action": {**ACTION, "q01": [0]}}, r"action.q01 has the shape \[1\]: 2 finite numbers"),
        ({"action": {name: value for name, value in ACTION.items() if not name.startswith("q")}}, "has no q01, q99"),
        ({"action": {**ACTION, "std": "wide"}}, "action.std is no list of numbers"),
        ({"action": {**ACTION, "q01": [0.5, 0]}}, "a q01 above its q99"),
    ],
)
def test_what_is_no_such_file_is_named(tmp_path: Path, tree: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        published_statistics(write(tmp_path / "stats.json", tree), MASK)
    with pytest.raises(ConfigError, match="not readable JSON"):
        published_statistics(str(tmp_path / "absent.json"), MASK)


def test_the_codec_is_fitted_to_them_and_again_when_they_change(
    tmp_path: Path, make_config: Callable[..., Config], write_shard: Callable[..., Path]
) -> None:
    shard = write_shard("demos/a.jsonl", [6, 9])
    path = tmp_path / "stats.json"
    wide: dict[str, Any] = {name: [value] * 7 for name, value in {"mean": 0, "std": 1, "min": -2, "max": 2}.items()}

    def fitted(q99: float) -> Any:
        write(path, {"action": {**wide, "q01": [-q99] * 7, "q99": [q99] * 7}})
        codec = prepare(make_config(shard, action={"statistics_path": str(path)})).codec
        assert codec is not None
        return codec

    assert fitted(2.0).statistics.q99.tolist() == [2.0] * 7
    assert fitted(4.0).statistics.q99.tolist() == [4.0] * 7
    assert fitted(2.0).statistics.mask.tolist() == [True] * 6 + [False]
    own = prepare(make_config(shard)).codec
    assert own is not None
    assert (own.statistics.q99 < 1).all()
    write(path, {"action": {name: value[:6] for name, value in {**wide, "q01": [-1] * 7, "q99": [1] * 7}.items()}})
    with pytest.raises(ConfigError, match=r"data.action.statistics_path .* shape \[6\]: 7 finite numbers"):
        prepare(make_config(shard, action={"statistics_path": str(path)}))


def test_the_file_of_a_real_data_set() -> None:
    path = SHARED / "lerobot_v3" / "meta" / "stats.json"
    if not path.exists():
        pytest.skip(f"NOT TESTED on real statistics: no {path}; set STOKER_SHARED_DATA")
    found = published_statistics(str(path), np.ones(7, np.bool_))
    assert found.count == 250
    assert (found.q01 < found.q99).all()
