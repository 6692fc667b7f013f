"""Mixtures through real loaders: robots and texts of different classes, weights, several loaders, resume."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.end_to_end.fleet import Pulled, pull, run_cli, serving, write_demonstrations
from tests.tiny_models import write_model_folder

CLASS = '''
from loader_service.sources.base import BaseSFTDataset, Sample, ScannedRecord

class Sums(BaseSFTDataset):
    """A row is a line `question|answer`."""

    shard_patterns = ("*.txt",)

    def scan(self, shard):
        for row, _ in enumerate(shard.read_text().splitlines()):
            yield ScannedRecord(offset=row, size=1, num_samples=1)

    def read(self, shard, offset, size):
        question, answer = shard.read_text().splitlines()[offset].split("|")
        yield Sample(instruction=question, answer=answer)
'''
ROBOTS, TEXTS = 48, 10  # samples


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "my_sums.py").write_text(CLASS)
    demos = write_demonstrations(folder / "demos", [6] * 8)
    for name, rows in (("train", TEXTS), ("val", 3)):
        (folder / f"{name}.txt").write_text("".join(f"{n} and {n}?|{2 * n}\n" for n in range(rows)))
    tree = {
        "model": {"base_model_path": str(write_model_folder(folder / "model"))},
        "data": {
            "sources": [
                {"dataset_type": "mani_openpi", "paths": [str(demos)], "weight": 2, "name": "robots"},
                {
                    "dataset_type": "my_sums:Sums",
                    "paths": [str(folder / "train.txt")],
                    "val_paths": [str(folder / "val.txt")],
                    "weight": 1,
                },
            ],
            "max_seq_len": 256,
            "cache_dir": str(folder / "cache"),
            "action": {"codec": "bins"},
            "order": {"lanes": 3, "window_records": 2, "cell": 4},
        },
        "loader": {"workers": 1},
        "trainer": {"micro_batch_size": 4, "global_batch_size": 8, "lr": 1e-3},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def undisturbed(config: Path) -> list[Pulled]:
    """Two epochs from one loader."""
    with serving(config, PYTHONPATH=_path(config)) as loader:
        return [pull(config, [loader.address], epoch=epoch) for epoch in range(2)]


def _path(config: Path) -> str:
    from tests.end_to_end.fleet import environment

    return f"{environment()['PYTHONPATH']}:{config.parent}"


def test_shares_are_the_weights_at_every_prefix(undisturbed: list[Pulled]) -> None:
    for pulled in undisturbed:
        entries = [key[0] for key in pulled.keys]
        assert Counter(entries) == {0: ROBOTS, 1: ROBOTS // 2}
        for length, texts in enumerate(itertools.accumulate(entries), 1):
            assert abs(texts - length / 3) <= 4  # one cell


def test_passes_over_the_smaller_source_are_whole_and_each_in_a_new_order(undisturbed: list[Pulled]) -> None:
    texts = [key[1] for pulled in undisturbed for key in pulled.keys if key[0] == 1]
    assert len(texts) == 48  # 2.4 passes an epoch: what the first leaves of its third pass the second takes
    passes = [texts[first : first + TEXTS] for first in range(0, 40, TEXTS)]
    assert all(sorted(one) == list(range(TEXTS)) for one in passes)
    assert len({tuple(one) for one in passes}) > 1
    robots = [sorted(key[1:] for key in pulled.keys if key[0] == 0) for pulled in undisturbed]
    assert robots[0] == robots[1]
    assert len(set(robots[0])) == ROBOTS


def test_any_fleet_and_any_resume_give_the_same_batches(config: Path, undisturbed: list[Pulled]) -> None:
    """Each source by a loader of its own: neither knows of the other."""
    where = yaml.safe_load(config.read_text())["data"]["sources"]
    codec = config.parent / "codec.json"
    assert run_cli("prepare", "--config", str(config), "--codec-out", str(codec), cwd=config.parent).returncode == 0
    given = ("--set", f"data.action.codec_path={codec}")
    shards = [["--shards", path] for source in where[:1] for path in source["paths"]]
    shards.append(["--shards", *where[1]["paths"], *where[1]["val_paths"]])
    with (
        serving(config, *shards[0], *given, PYTHONPATH=_path(config)) as robots,
        serving(config, *shards[1], *given, PYTHONPATH=_path(config)) as texts,
    ):
        both = [robots.address, texts.address]
        assert pull(config, both, epoch=1).steps == undisturbed[1].steps
        late = pull(config, both, epoch=1, first_sample=24, ranks=2)
        assert late.steps == undisturbed[1].steps[3:]
        assert len(pull(config, both, split="val").keys) == 3


def test_text_samples_travel_without_images_and_actions(config: Path) -> None:
    from stoker_proto.config.reader import load_config
    from trainer.feed.feed import Feed

    with serving(config, PYTHONPATH=_path(config)) as loader:
        loaded = load_config(config, [f"cluster.loader_addresses=[{loader.address}]"])
        with Feed(loaded, "train", 0, 1) as feed:
            info = feed.connect()
            assert info.source_samples == (48, 24)
            assert info.pass_samples == (48, 10)
            batch = next(iter(feed.steps(0, 0)))
    for micro in batch.micro_batches:
        is_text = micro.keys[:, 0] == 1
        assert (micro.image_counts == ~is_text).all()
        if micro.actions.size:
            assert (np.isnan(micro.actions).all(axis=(1, 2)) == is_text).all()
