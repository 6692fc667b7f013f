"""Loaders that hold parts of one entry: the batches of one loader that holds it all."""

from __future__ import annotations

import json
import shutil
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from stoker_proto.errors import DeadlineError, RefusedError
from tests.end_to_end.fleet import Loader, Pulled, pull, run_cli, serving, write_config, write_demonstrations


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One entry, a folder of six shards with some trajectories each."""
    folder = tmp_path / "demos"
    for number in range(6):
        shard = write_demonstrations(tmp_path / "made" / str(number), [5 + number, 3, 7 - number], seed=number)
        lines = [json.loads(line) for line in shard.read_text().splitlines()]
        for line in lines:
            name = f"{number}-{Path(line['obs_path']).parent.name}"
            shutil.copytree(shard.parent / Path(line["obs_path"]).parent, folder / name)
            line["obs_path"] = f"{name}/obs.npz"
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"train-{number // 3}{number % 3}.jsonl").write_text(text)
    return folder


def two_epochs(config: Path, addresses: list[str], *overrides: str, on_step: object = None) -> list[Pulled]:
    return [pull(config, addresses, *overrides, epoch=epoch, on_step=None if epoch else on_step) for epoch in (0, 1)]


def test_two_loaders_of_parts_serve_what_one_serves(tmp_path: Path, model: Path, folder: Path) -> None:
    """Also while one of them, which alone has its shards, is killed and started again."""
    config = write_config(tmp_path, model, [folder])
    with serving(config) as whole:
        expected = two_epochs(config, [whole.address])
    parts = [f"{folder}/train-0*.jsonl", f"{folder}/train-1*.jsonl"]
    with ExitStack() as stack:
        first, second = (stack.enter_context(serving(config, "--shards", part)) for part in parts)
        assert "train: 3 shards of 6 shards of entries held in part" in first.ready_line

        def kill_one(step: int) -> None:
            if step == 3:
                assert second.end(signal.SIGKILL) == -signal.SIGKILL
                again = serving(config, "--shards", parts[1], "--bind", second.address)
                stack.enter_context(again)

        found = two_epochs(config, [first.address, second.address], on_step=kill_one)
    for epoch in (0, 1):
        assert found[epoch].keys == expected[epoch].keys
        assert found[epoch].steps == expected[epoch].steps
    assert len(expected[0].keys) == sum(5 + number + 3 + 7 - number for number in range(6))


def test_two_hosts_that_have_half_of_the_files_each(tmp_path: Path, model: Path, folder: Path) -> None:
    """Each has a copy of the cache of the host that prepared the whole, and no path is the same."""
    config = write_config(tmp_path, model, [folder], cache_dir=None)
    assert run_cli("prepare", "--config", str(config)).returncode == 0
    halves = []
    for half in "01":
        copy = tmp_path / f"host-{half}" / "data"
        shutil.copytree(folder, copy)
        for npz in copy.glob("[345]-*" if half == "0" else "[012]-*"):
            shutil.rmtree(npz)
        for shard in copy.glob(f"train-{1 - int(half)}*"):
            shard.unlink()
        own = copy.parent / "config"
        own.mkdir()
        halves.append((write_config(own, model, [copy], cache_dir=None), f"{copy}/*.jsonl"))
    assert [len(list((tmp_path / f"host-{half}" / "data").glob("*.jsonl"))) for half in "01"] == [3, 3]
    with serving(config) as whole:
        expected = two_epochs(config, [whole.address])
    with ExitStack() as stack:
        fleet = [stack.enter_context(serving(own, "--shards", glob)) for own, glob in halves]
        assert "train: 3 shards of 6 shards of entries held in part" in fleet[0].ready_line
        found = two_epochs(config, [loader.address for loader in fleet])
    for epoch in (0, 1):
        assert found[epoch].keys == expected[epoch].keys
        assert found[epoch].steps == expected[epoch].steps


@pytest.mark.slow
def test_parts_that_overlap_and_a_loader_of_everything_serve_together(
    tmp_path: Path, model: Path, folder: Path
) -> None:
    config = write_config(tmp_path, model, [folder])
    with ExitStack() as stack:
        globs = [f"{folder}/train-0*.jsonl", f"{folder}/train-?[12].jsonl", str(folder)]
        fleet: list[Loader] = [stack.enter_context(serving(config, "--shards", glob)) for glob in globs]
        expected = pull(config, [fleet[2].address])
        found = pull(config, [loader.address for loader in fleet], ranks=2)
        # Alone, the first two lack one shard.
        with pytest.raises(DeadlineError, match=r"held by no ready loader: of entry 0, .*: shard train-10\.jsonl"):
            pull(config, [loader.address for loader in fleet[:2]], "trainer.feed.connect_deadline_s=3")
    assert found.steps == expected.steps


def test_a_part_of_other_data_is_refused(tmp_path: Path, model: Path, folder: Path) -> None:
    config = write_config(tmp_path, model, [folder])
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    changed = other / "train-12.jsonl"
    changed.write_text(changed.read_text().replace("PickCube-v1", "PushCube-v1", 1))
    of_other = write_config(tmp_path, model, [other])
    with (
        serving(config, "--shards", f"{folder}/train-0*.jsonl") as first,
        serving(of_other, "--shards", f"{other}/train-1*.jsonl") as second,
        pytest.raises(RefusedError, match="manifest/train/0"),
    ):
        pull(config, [first.address, second.address])


@pytest.mark.slow
def test_parts_of_dialogues_and_trajectories_in_a_mixture(tmp_path: Path, model: Path, folder: Path) -> None:
    chats = tmp_path / "chats"
    chats.mkdir()
    for shard in range(2):
        rows = [
            {"messages": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": "a " * (n % 7 + 1)}]}
            for n in range(shard, 24, 2)
        ]
        (chats / f"chat-{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = write_config(tmp_path, model, [folder])
    tree = yaml.safe_load(plain.read_text())
    for key in ("dataset_type", "train_data_paths"):
        del tree["data"][key]
    tree["data"]["sources"] = [
        {"dataset_type": "mani_openpi", "paths": [str(folder)], "weight": 2, "name": "robots"},
        {"dataset_type": "chat", "paths": [str(chats)], "weight": 1, "name": "chats"},
    ]
    config = tmp_path / "mixture.yaml"
    config.write_text(yaml.safe_dump(tree))
    with serving(config) as whole:
        expected = pull(config, [whole.address])
    with (
        serving(config, "--shards", f"{folder}/train-0*.jsonl", f"{chats}/chat-1.jsonl") as first,
        serving(config, "--shards", f"{folder}/train-1*.jsonl", f"{chats}/chat-0.jsonl") as second,
    ):
        found = pull(config, [first.address, second.address])
    assert found.keys == expected.keys
    assert found.steps == expected.steps
    assert {key[0] for key in found.keys} == {0, 1}
