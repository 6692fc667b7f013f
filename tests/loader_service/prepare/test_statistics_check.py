"""Which dimensions are normalised, and whether the statistics describe the data: wrong ones clip actions without a word."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loader_service.prepare.mask import derived_mask
from loader_service.prepare.run import prepare
from loader_service.prepare.summary import action_findings
from stoker_proto.actions import ActionCodec, save_codec
from stoker_proto.config import Config
from stoker_proto.errors import ConfigError
from tests.loader_service.sources.lerobot.files import write_lerobot

MakeConfig = Callable[..., Config]
END_EFFECTOR = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
CODECS = ["bins", "vq"]


def rows_of(low: Sequence[float], high: Sequence[float], count: int = 400) -> np.ndarray:
    """float32[count, D], evenly spread in each dimension, in another order in each."""
    random = np.random.default_rng(3)
    columns = [random.permutation(np.linspace(a, b, count)) for a, b in zip(low, high, strict=True)]
    return np.stack(columns, axis=1).astype(np.float32)


def write_rows(path: Path, rows: np.ndarray, length: int = 50) -> Path:
    """A shard of trajectories of `length` actions. Their NPZ need not exist: the scan opens none."""
    lines = [
        {"obs_path": f"{i}/obs.npz", "task": "PushCube-v1", "actions": rows[i : i + length].tolist()}
        for i in range(0, len(rows), length)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def codec_of(config: Config) -> ActionCodec:
    codec = prepare(config).codec
    assert codec is not None
    return codec


def largest_error(codec: ActionCodec, rows: np.ndarray) -> list[float]:
    decoded = codec.decode(codec.encode(rows[:, None]))[:, 0]
    return np.abs(decoded - rows).max(axis=0).tolist()  # type: ignore[no-any-return]


@pytest.mark.long
@pytest.mark.parametrize(
    ("low", "high", "mask"),
    [
        ([-1] * 6 + [0], [1] * 7, [True] * 6 + [False]),  # OpenVLA's gripper
        ([-3] * 7, [3] * 7, [True] * 7),  # 7 joints
        ([-3] * 7 + [0], [3] * 7 + [1], [True] * 8),  # 7 joints and a gripper
        ([-1] * 6 + [0], [1] * 6 + [850], [True] * 7),  # a gripper of 0 to 850
        ([-1] * 3, [1] * 3, [True] * 3),
    ],
)
@pytest.mark.parametrize("codec", CODECS)
def test_only_a_gripper_in_range_is_not_normalised(
    tmp_path: Path, make_config: MakeConfig, low: list[float], high: list[float], mask: list[bool], codec: str
) -> None:
    rows = rows_of(low, high)
    options = {"action_dim": len(low)}
    found = codec_of(make_config(write_rows(tmp_path / "a.jsonl", rows), action={"codec": codec}, options=options))
    assert found.statistics.mask.tolist() == mask
    # Within q01..q99 (1% of the range is clamped at each end) and half a bin: 2% of the range, never 849 of 850.
    for error, a, b in zip(largest_error(found, rows), low, high, strict=True):
        assert error <= 0.02 * (b - a)


@pytest.mark.parametrize(
    ("names", "unmasked"),
    [
        ([], [6]),
        ([END_EFFECTOR], [6]),
        ([tuple(f"motor_{i}" for i in range(7))], [6]),  # says nothing
        ([tuple(f"joint_{i}" for i in range(7))], []),
        ([(*(f"joint_{i}" for i in range(6)), "gripper")], []),
        ([("x", "y", "z", "qx", "qy", "qz", "qw")], []),
        ([("gripper", "x", "y", "z", "roll", "pitch", "yaw")], []),
        ([END_EFFECTOR, tuple(f"joint_{i}" for i in range(7))], []),  # two data sets that differ
    ],
)
def test_the_names_of_the_data_decide_where_it_has_some(names: list[tuple[str, ...]], unmasked: list[int]) -> None:
    mask = derived_mask(np.full(7, -1.0), np.full(7, 1.0), names)
    assert np.flatnonzero(~mask).tolist() == unmasked


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize(
    ("names", "unmasked"),
    [
        (list(END_EFFECTOR), [6]),
        ({"axes": list(END_EFFECTOR)}, [6]),
        ({name: d for d, name in enumerate(END_EFFECTOR)}, [6]),
        ({"motors": [f"joint_{i}" for i in range(7)]}, []),
        ([[f"joint_{i}" for i in range(7)]], []),
    ],
)
def test_lerobot_names_dimensions(
    tmp_path: Path, make_config: MakeConfig, version: str, names: object, unmasked: list[int]
) -> None:
    root = write_lerobot(tmp_path / "set", [6, 9], version=version, videos=(), images=())
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["action"]["names"] = names
    (root / "meta/info.json").write_text(json.dumps(info))
    config = make_config(root, dataset_type="lerobot")
    assert np.flatnonzero(~codec_of(config).statistics.mask).tolist() == unmasked


def test_a_named_dimension_out_of_range_is_refused(tmp_path: Path, make_config: MakeConfig) -> None:
    shard = write_rows(tmp_path / "a.jsonl", rows_of([-1] * 6 + [0], [1] * 6 + [850]))
    with pytest.raises(
        ConfigError,
        match=r"unmasked is \[6\], so dimension 6 would be clipped to \[-1, 1\], .* has 0 to 850 there: remove it",
    ):
        prepare(make_config(shard, action={"unmasked": (6,)}))
    with pytest.raises(ConfigError, match=r"unmasked is \[7\], and the actions have the dimensions 0 to 6"):
        prepare(make_config(shard, action={"unmasked": (7,)}))
    assert codec_of(make_config(shard, action={"unmasked": ()})).statistics.mask.tolist() == [True] * 7
    assert codec_of(make_config(shard, action={"unmasked": (0, 2)})).statistics.mask.tolist() == [
        False, True, False, True, True, True, True,
    ]  # fmt: skip


def published(path: Path, **parts: list[float]) -> str:
    whole = {"min": [-1.0] * 7, "max": [1.0] * 7, "mean": [0.0] * 7, "std": [0.5] * 7, "count": [400]}
    path.write_text(json.dumps({"action": {**whole, **parts}}))
    return str(path)


def test_published_statistics_without_a_range_are_an_error(tmp_path: Path, make_config: MakeConfig) -> None:
    shard = write_rows(tmp_path / "a.jsonl", rows_of([-1] * 7, [1] * 7))
    low, high = [-1.0] * 7, [1.0] * 7
    path = published(tmp_path / "stats.json", q01=[*low[:2], 0, *low[3:]], q99=[*high[:2], 0, *high[3:]])
    action: dict[str, Any] = {"statistics_path": path}
    for _ in range(2):  # a failed fit is not kept
        with pytest.raises(
            ConfigError,
            match=r"dimension 2 of the actions: the codec clamps 100\.0% .*most_clamped is 0\.3\. "
            r"data\.action\.statistics_path .*stats\.json has q01 0 and q99 0, "
            r"and the train data lies in -1 to 1: name the statistics of this data",
        ):
            prepare(make_config(shard, action=action))
    prepared = prepare(make_config(shard, action={**action, "most_clamped": 1.0}))
    [flat, clamped] = action_findings(prepared, make_config(shard, action=action).data.action)
    assert "dimension 2: data.action.statistics_path" in flat
    assert "q01 = q99 = 0, and the train data has -1 to 1" in flat
    assert "dimension 2: 100.0% of the numbers are clamped" in clamped
    with pytest.raises(ConfigError, match=r"most_clamped is 0\.3"):  # what was fitted with another limit is not used
        prepare(make_config(shard, action=action))


@pytest.mark.parametrize(("half", "passes"), [(0.75, True), (0.65, False)])
def test_the_limit_is_a_share_of_one_dimension(
    tmp_path: Path, make_config: MakeConfig, half: float, passes: bool
) -> None:
    shard = write_rows(tmp_path / "a.jsonl", rows_of([-1] * 7, [1] * 7))  # 1 - half of the numbers lie outside
    path = published(tmp_path / "stats.json", q01=[-1.0] * 5 + [-half, -1.0], q99=[1.0] * 5 + [half, 1.0])
    config = make_config(shard, action={"statistics_path": path})
    if not passes:
        with pytest.raises(ConfigError, match=r"dimension 5 .* clamps 35\.\d% of the numbers"):
            prepare(config)
        return
    [line] = action_findings(prepare(config), config.data.action)
    assert line.startswith("dimension 5: 25.")


def test_published_quantiles_that_are_far_too_wide_are_named(tmp_path: Path, make_config: MakeConfig) -> None:
    shard = write_rows(tmp_path / "a.jsonl", rows_of([-0.1] * 7, [0.1] * 7))
    path = published(tmp_path / "stats.json", q01=[-1.0] * 7, q99=[1.0] * 7)
    config = make_config(shard, action={"statistics_path": path})
    lines = action_findings(prepare(config), config.data.action)
    assert len(lines) == 7
    assert "more than 4 times as wide" in lines[0]


def test_text_is_no_statistic(tmp_path: Path, make_config: MakeConfig) -> None:
    shard = write_rows(tmp_path / "a.jsonl", rows_of([-1] * 7, [1] * 7))
    path = published(tmp_path / "stats.json", q01=["-0.9"] * 7, q99=[0.9] * 7)  # type: ignore[list-item]
    with pytest.raises(ConfigError, match=r"action\.q01 is no list of numbers: \['-0\.9'"):
        prepare(make_config(shard, action={"statistics_path": path}))


def test_a_published_mask_decides_unless_it_cannot(tmp_path: Path, make_config: MakeConfig) -> None:
    def mask_of(mask: list[bool], high: float = 1.0) -> list[bool]:
        shard = write_rows(tmp_path / "a.jsonl", rows_of([-1] * 7, [1] * 6 + [high]))
        path = published(tmp_path / "s.json", q01=[-1.0] * 7, q99=[1.0] * 6 + [high], mask=mask)  # type: ignore[arg-type]
        return codec_of(make_config(shard, action={"statistics_path": path})).statistics.mask.tolist()  # type: ignore[no-any-return]

    assert mask_of([True] * 7) == [True] * 7
    assert mask_of([False] + [True] * 6) == [False] + [True] * 6
    with pytest.raises(ConfigError, match=r"has mask false in it, so dimension 6 would be clipped .* -1 to 850"):
        mask_of([True] * 6 + [False], 850)


@pytest.mark.parametrize("codec", CODECS)
def test_a_dimension_that_hardly_moves_comes_back(tmp_path: Path, make_config: MakeConfig, codec: str) -> None:
    rows = rows_of([-1] * 6 + [0], [1] * 6 + [0], 1000)
    rows[:, 6] = 2.0  # out of [-1, 1], so it is normalised; three values, so that q01 = q99
    rows[[5, 400, 900], 6] = [5.0, 7.0, 9.0]
    rows[:, 3] = 0.25
    config = make_config(write_rows(tmp_path / "a.jsonl", rows), action={"codec": codec})
    prepared = prepare(config)
    assert prepared.codec is not None
    error = largest_error(prepared.codec, rows)
    assert error[3] == 0.0
    assert error[6] <= 7 / 255  # a bin of 2..9
    assert action_findings(prepared, config.data.action) == [
        "dimension 3 never moves: it is 0.25 in all actions, and comes back as this value",
        "dimension 6 hardly moves: q01 = q99 = 2, so it is scaled by its range, 2 to 9",
    ]


@pytest.mark.parametrize("count", [1, 3, 30, 150, 2000])
@pytest.mark.parametrize("codec", CODECS)
def test_the_own_statistics_of_honest_data_pass(
    tmp_path: Path, make_config: MakeConfig, count: int, codec: str
) -> None:
    random = np.random.default_rng(count)
    rows = random.standard_t(2, (count, 7)).astype(np.float32)  # heavy tails
    config = make_config(write_rows(tmp_path / "a.jsonl", rows), action={"codec": codec, "most_clamped": 0.05})
    assert codec_of(config).statistics.count == count


def test_a_codec_of_other_data_is_refused(tmp_path: Path, make_config: MakeConfig) -> None:
    small = codec_of(make_config(write_rows(tmp_path / "a.jsonl", rows_of([-0.1] * 7, [0.1] * 7))))
    save_codec(small, tmp_path / "codec.json")
    shard = write_rows(tmp_path / "b.jsonl", rows_of([-1] * 7, [1] * 7))
    config = make_config(shard, action={"codec_path": str(tmp_path / "codec.json")})
    with pytest.raises(ConfigError, match=r"clamps 9\d\.\d% .*data\.action\.codec_path .* fitted to this data"):
        prepare(config)
