"""The action codec: what it is fitted on, when it is fitted anew, when it is taken as given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from loader_service.prepare import fit as fit_module
from loader_service.prepare.actions_state import (
    SAMPLE_CAPACITY,
    ActionCounter,
    GatheredActions,
    actions_to_keep,
)
from loader_service.prepare.fit import train_actions
from loader_service.prepare.run import prepare
from loader_service.sources.base import BaseSFTDataset, Sample, ScannedRecord
from stoker_proto.actions import ActionCodec, StatisticsAccumulator, load_codec, save_codec
from stoker_proto.config import Config, SourceConfig
from stoker_proto.errors import ConfigError, DataError
from tests.end_to_end.fleet import wait_until

MakeConfig = Callable[..., Config]
WriteShard = Callable[..., Path]


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the codecs that were really fitted."""
    names: list[str] = []
    real = fit_module.fit_codec

    def counting(name: str, *arguments: object, **options: object) -> object:
        names.append(name)
        return real(name, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(fit_module, "fit_codec", counting)
    return names


def test_the_codec_is_fitted_on_all_train_entries_together(make_config: MakeConfig, write_shard: WriteShard) -> None:
    a, b = write_shard("a/a.jsonl", [30]), write_shard("b/b.jsonl", [20], seed=1)
    val = write_shard("v/v.jsonl", [50], seed=2)
    prepared = prepare(make_config(a, b, val=[val]))
    assert prepared.statistics is not None
    assert prepared.statistics.count == 50
    assert prepared.codec is not None
    swapped = prepare(make_config(b, a, val=[val]))
    assert swapped.statistics is not None
    assert swapped.statistics.to_json() == prepared.statistics.to_json()
    assert swapped.codec is not None
    assert swapped.codec.fingerprint == prepared.codec.fingerprint


def test_a_fitted_codec_is_kept_per_data_and_settings(
    make_config: MakeConfig, write_shard: WriteShard, fits: list[str]
) -> None:
    shard = write_shard("a/a.jsonl", [30])
    first = prepare(make_config(shard)).codec
    again = prepare(make_config(shard, action={"codec_options": {}})).codec
    assert fits == ["bins"]
    assert first is not None
    assert again is not None
    assert again.fingerprint == first.fingerprint
    chunked = prepare(make_config(shard, action={"chunk": 2})).codec
    assert chunked is not None
    assert chunked.chunk == 2
    prepare(make_config(shard, action={"codec_options": {"num_bins": 64}}))
    prepare(make_config(shard, action={"unmasked": ()}))
    assert fits == ["bins"] * 4
    write_shard("a/a.jsonl", [31])
    prepare(make_config(shard))
    assert fits == ["bins"] * 5


def test_of_loaders_that_start_together_one_fits(
    make_config: MakeConfig, write_shard: WriteShard, fits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(write_shard("a/a.jsonl", [30]))
    root = next(iter(prepare(config).entries["train"].values())).folder.parents[2]
    for file in (root / "codecs").iterdir():
        file.unlink()
    fits.clear()
    looks: list[Path] = []
    kept, fit = fit_module._kept, fit_module.fit_codec

    def looking(path: Path) -> ActionCodec | None:
        looks.append(path)
        return kept(path)

    def slow(*arguments: Any, **options: Any) -> ActionCodec:
        wait_until(lambda: len(looks) > 4, 60, "all have looked, and the one that fits twice")
        return fit(*arguments, **options)

    monkeypatch.setattr(fit_module, "_kept", looking)
    monkeypatch.setattr(fit_module, "fit_codec", slow)
    with ThreadPoolExecutor(4) as pool:
        codecs = [prepared.codec for prepared in pool.map(lambda _: prepare(config), range(4))]
    assert fits == ["bins"]
    assert len({codec.fingerprint for codec in codecs if codec is not None}) == 1
    assert len(list((root / "codecs").iterdir())) == 1


def test_a_given_codec_is_taken_and_nothing_is_fitted(
    make_config: MakeConfig, write_shard: WriteShard, fits: list[str], tmp_path: Path
) -> None:
    shard = write_shard("a/a.jsonl", [30])
    codec = prepare(make_config(shard)).codec
    assert codec is not None
    save_codec(codec, tmp_path / "codec.json")
    other = write_shard("b/b.jsonl", [20], seed=1)
    fits.clear()
    path = str(tmp_path / "codec.json")
    prepared = prepare(make_config(other, action={"codec_path": path}))
    assert fits == []
    assert prepared.codec is not None
    assert prepared.codec.fingerprint == codec.fingerprint
    with pytest.raises(
        ConfigError, match=r"codec_path .*codec\.json is a bins codec of chunks of 1, and the config asks for codec"
    ):
        prepare(make_config(other, action={"codec_path": path, "codec": "vq"}))
    with pytest.raises(ConfigError, match="asks for codec bins and chunk 3"):
        prepare(make_config(other, action={"codec_path": path, "chunk": 3}))
    wide = tmp_path / "wide.jsonl"
    wide.write_text('{"obs_path": "x", "task": "PushCube-v1", "actions": [[0, 1]]}\n')
    with pytest.raises(DataError, match="actions of 2 dimensions, and the action codec has 7"):
        prepare(make_config(wide, action={"codec_path": path}, options={"action_dim": 2}))


def test_a_loader_without_all_train_data_is_told_to_name_a_codec(
    make_config: MakeConfig, write_shard: WriteShard
) -> None:
    config = make_config(write_shard("a/a.jsonl", [3]), write_shard("b/b.jsonl", [3]))
    with pytest.raises(ConfigError) as caught:
        prepare(config, held={"train": [0]})
    assert str(caught.value) == (
        "data.train_data_paths[1] is not here, and the action codec is fitted on all train data: run `loader-prepare "
        "--codec-out FILE` where all of it is, and name that file in data.action.codec_path"
    )


def test_text_that_is_elsewhere_leaves_nothing_out_of_the_fit(
    make_config: MakeConfig, write_shard: WriteShard, tmp_path: Path
) -> None:
    """A loader that holds validation data alone starts, and one without the mixture's dialogues fits as the others do."""
    demos = write_shard("a/a.jsonl", [30])
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n')
    text = make_config(chat, val=[chat], dataset_type="chat")
    assert prepare(text, held={"train": [], "val": [0]}).codec is None
    sources = (
        SourceConfig(dataset_type="mani_openpi", paths=(str(demos),), val_paths=(str(demos),)),
        SourceConfig(dataset_type="chat", paths=(str(chat),), val_paths=(str(chat),)),
    )
    config = make_config()
    mixture = replace(config, data=replace(config.data, dataset_type="", sources=sources))
    whole, part = prepare(mixture).codec, prepare(mixture, held={"train": [0], "val": []}).codec
    assert whole is not None
    assert part is not None
    assert part.fingerprint == whole.fingerprint
    with pytest.raises(
        ConfigError, match=r"data\.sources\[0\]\.paths\[0\] is not here, and the action codec is fitted"
    ):
        prepare(mixture, held={"train": [], "val": [1]})


def test_wrong_settings_are_refused(make_config: MakeConfig, write_shard: WriteShard) -> None:
    shard = write_shard("a/a.jsonl", [30])
    with pytest.raises(ConfigError, match="num_bin"):
        prepare(make_config(shard, action={"codec_options": {"num_bin": 5}}))
    with pytest.raises(ConfigError, match=r"data\.action\.unmasked is \[-1\]: dimensions are counted from 0"):
        prepare(make_config(shard, action={"unmasked": (-1,)}))


def counted(rows: np.ndarray, base: int) -> StatisticsAccumulator:
    counter = ActionCounter("shard", base)
    for start in range(0, len(rows), 50):
        counter.add(rows[start : start + 50])
    found = counter.finish()
    assert found is not None
    assert found.chunks is None
    return found.statistics


def test_a_count_survives_the_cache() -> None:
    rows = np.random.default_rng(1).normal(size=(3000, 7)).astype(np.float32)
    actions = counted(rows, 5)
    again = StatisticsAccumulator.from_arrays(actions.to_arrays(SAMPLE_CAPACITY), SAMPLE_CAPACITY)
    assert again is not None
    for a, b in zip(actions.finish(), again.finish(), strict=True):
        assert (a.to_json() if hasattr(a, "to_json") else a.tolist()) == (
            b.to_json() if hasattr(b, "to_json") else b.tolist()
        )


def test_parts_that_keep_less_give_the_same_sample() -> None:
    """Each of 16 equal parts keeps a quarter of the sample's capacity at most; together they give the whole sample."""
    rows = np.random.default_rng(1).normal(size=(16, 20_000, 2)).astype(np.float32)
    keep = actions_to_keep(1, 16)
    assert keep == SAMPLE_CAPACITY // 4
    full, thrifty = (StatisticsAccumulator(2, capacity=SAMPLE_CAPACITY) for _ in range(2))
    for number, part in enumerate(rows):
        actions = counted(part, number << 40)
        full.merge(actions)
        kept = actions.to_arrays(keep)
        assert len(kept["rows"]) == keep
        restored = StatisticsAccumulator.from_arrays(kept, keep)
        assert restored is not None
        thrifty.merge(restored)
        assert StatisticsAccumulator.from_arrays(kept, 2 * keep) is None  # more is asked for than was kept: scan again
    assert thrifty.finish()[0].to_json() == full.finish()[0].to_json()
    np.testing.assert_array_equal(thrifty.finish()[1], full.finish()[1])


def test_the_share_that_a_part_keeps() -> None:
    assert [actions_to_keep(part, 1 << 30) for part in (1, 1 << 20, 1 << 24, 1 << 28, 1 << 30)] == [
        256,
        256,
        4096,
        65_536,
        65_536,
    ]


class Drawn(BaseSFTDataset):
    """A row `seed num_actions padding`: random actions, spread over [-1, 1]."""

    shard_patterns = ("*.txt",)
    scans: ClassVar[list[str]] = []

    def scan(self, shard: Path) -> Iterator[ScannedRecord]:
        self.scans.append(shard.name)
        for row, line in enumerate(shard.read_text().splitlines()):
            seed, number = map(int, line.split()[:2])
            actions = np.random.default_rng(seed).uniform(-1, 1, (number, 1)).astype(np.float32)
            actions *= 0.1 if shard.name == "heavy.txt" else 1.0
            yield ScannedRecord(offset=row, size=1, num_samples=number, actions=actions)

    def read(self, shard: Path, offset: int, size: int) -> Iterator[Sample]:
        raise NotImplementedError


@pytest.mark.parametrize(("heavy", "action"), [(300, {}), (60_000, {}), (300, {"codec": "fast", "chunk": 2})])
def test_the_sample_is_fair_where_some_files_are_dense(
    heavy: int, action: dict[str, Any], tmp_path: Path, make_config: MakeConfig
) -> None:
    """One file has nearly all the bytes (images in its rows, say), the other nearly all the actions."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "heavy.txt").write_text("\n".join(f"{seed} {heavy // 3} {'x' * 100_000}" for seed in range(3)))
    (folder / "light.txt").write_text("\n".join(f"{seed} 5000" for seed in range(3, 43)))
    config = make_config(folder, dataset_type=f"{__name__}:Drawn", action=action)
    Drawn.scans.clear()
    prepared = prepare(config, fit=False)
    assert Drawn.scans == ["heavy.txt", "light.txt", "light.txt"], "the dense file is scanned again"
    entry = prepared.entries["train"][0]
    statistics, sample = train_actions([entry], config.data.action)
    assert statistics.count == heavy + 200_000
    if not action:
        assert sample.shape == (SAMPLE_CAPACITY, 1)
        small = (np.abs(sample) <= 0.1).mean()
        expected = (heavy + 20_000) / (heavy + 200_000)
        assert abs(small - expected) < 0.01
        assert statistics.q99[0] == pytest.approx(0.98 - 0.02 * heavy / 200_000, abs=0.01)
    else:
        assert len(sample) == SAMPLE_CAPACITY // 8
    (folder / "more.txt").write_text("50 100")
    Drawn.scans.clear()
    prepare(config, fit=False)
    assert Drawn.scans == ["more.txt"], "what was scanned twice keeps enough"


def test_whole_chunks_are_sampled_whatever_the_parts() -> None:
    """Trajectories of 1 to 40 steps, cut into parts at other places: the same chunks, none across two trajectories."""
    random = np.random.default_rng(4)
    trajectories = [
        np.full((length, 2), number, np.float32) for number, length in enumerate(random.integers(1, 40, 900))
    ]
    for trajectory in trajectories:
        trajectory[:, 1] = np.arange(len(trajectory))
    counter = ActionCounter("shard", 9, chunk=3)
    for trajectory in trajectories:
        counter.add(trajectory)
    whole = counter.finish()
    assert whole is not None
    assert whole.chunks is not None
    found = whole.chunks.finish()
    assert found.shape == (8192, 3, 2)
    assert whole.chunks.count == sum(map(len, trajectories))
    assert (found[:, :1, 0] == found[:, :, 0]).all()
    last = np.array([len(trajectory) - 1 for trajectory in trajectories])[found[:, 0, 0].astype(int)]
    assert (found[:, :, 1] == np.minimum(found[:, :1, 1] + np.arange(3), last[:, None])).all()
    starts = {tuple(chunk[0].tolist()) for chunk in found}
    assert len(starts) == 8192
    merged = GatheredActions.empty(2, 3)
    before = 0
    for first in range(0, 900, 100):
        part = ActionCounter("shard", 9 + before, chunk=3)
        for trajectory in trajectories[first : first + 100]:
            part.add(trajectory)
        before += part_count(part)
        gathered = part.finish()
        assert gathered is not None
        kept = GatheredActions.from_arrays(gathered.to_arrays(SAMPLE_CAPACITY), SAMPLE_CAPACITY, 3)
        assert kept is not None
        merged.merge(kept)
    assert merged.chunks is not None
    np.testing.assert_array_equal(merged.chunks.finish(), found)
    thrifty = whole.to_arrays(1024)
    assert len(thrifty["chunks"]) == 128
    assert GatheredActions.from_arrays(thrifty, 1024, 3) is not None
    assert GatheredActions.from_arrays(thrifty, 2048, 3) is None  # more is asked for than was kept: scan again


def part_count(counter: ActionCounter) -> int:
    gathered = counter.finish()
    return 0 if gathered is None else gathered.statistics.count


def test_the_scan_depends_on_the_chunk_only_for_codecs_of_chunks(
    make_config: MakeConfig, write_shard: WriteShard, scanned: list[str]
) -> None:
    shard = write_shard("a/a.jsonl", [30, 5])
    for action, is_new in (
        ({"codec": "bins"}, True),
        ({"codec": "bins", "chunk": 4}, False),
        ({"codec": "fast", "chunk": 4}, True),
        ({"codec": "fast", "chunk": 4, "codec_options": {"scale": 20}}, False),
        ({"codec": "fast", "chunk": 5}, True),
        ({"codec": "fast", "chunk": 4}, False),
    ):
        scanned.clear()
        codec = prepare(make_config(shard, action=action)).codec
        assert bool(scanned) == is_new, action
        assert codec is not None
        assert (codec.name, codec.chunk) == (action["codec"], action.get("chunk", 1))


@pytest.mark.long
def test_fast_is_fitted_on_chunks_of_all_entries_the_same_in_any_order(
    make_config: MakeConfig, write_shard: WriteShard, tmp_path: Path
) -> None:
    a, b = write_shard("a/a.jsonl", [30, 1, 7]), write_shard("b/b.jsonl", [20] * 9, seed=1)
    action = {"codec": "fast", "chunk": 4}
    codec = prepare(make_config(a, b, action=action)).codec
    assert codec is not None
    swapped = prepare(make_config(b, a, action=action, cache_dir=str(tmp_path / "elsewhere"))).codec
    assert swapped is not None
    assert swapped.fingerprint == codec.fingerprint
    save_codec(codec, tmp_path / "codec.json")
    given = prepare(make_config(a, action={**action, "codec_path": str(tmp_path / "codec.json")})).codec
    assert given is not None
    assert given.fingerprint == load_codec(tmp_path / "codec.json").fingerprint
