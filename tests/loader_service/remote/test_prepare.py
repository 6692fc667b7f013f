"""loader-prepare and datasets over URLs, in one process: listings, stamps, fingerprints, what may be read."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from loader_service.manifest import EntryManifest
from loader_service.prepare import parts
from loader_service.prepare.run import prepare
from loader_service.prepare.verify import verify
from loader_service.sources.base import BaseSFTDataset, Sample, make_dataset
from stoker_proto.config import ActionConfig, Config, DataConfig, ModelConfig, TrainerConfig
from stoker_proto.config.remote import RemoteConfig
from stoker_proto.errors import ConfigError, DataError
from tests.end_to_end.fleet import environment, write_demonstrations
from tests.loader_service.remote.http_files import HttpFiles

MakeConfig = Callable[..., Config]


@pytest.fixture
def config(tmp_path: Path) -> MakeConfig:
    """A config of these entries; its cache folder is `cache` of the test's folder, or another name."""

    def make(*paths: str | Path, cache: str = "cache", **data: Any) -> Config:
        values = {"dataset_type": "mani_openpi", "max_seq_len": 64, "remote": RemoteConfig(min_free_gb=0), **data}
        return Config(
            model=ModelConfig(base_model_path="unused"),
            data=DataConfig(
                train_data_paths=tuple(map(str, paths)),
                cache_dir=str(tmp_path / cache),
                action=ActionConfig(codec="bins"),
                **values,
            ),
            trainer=TrainerConfig(micro_batch_size=1, global_batch_size=1, lr=1e-4),
        )

    return make


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[Path]:
    """A local folder of demonstrations, and the same in memory://bucket."""
    folder = tmp_path / "demos"
    write_demonstrations(folder, [3, 5])
    (folder / "more.jsonl").write_text((folder / "demos.jsonl").read_text())
    (folder / ".hidden.jsonl").write_text("no JSON")
    memory = fsspec.filesystem("memory", skip_instance_cache=True)
    memory.put(f"{folder}/", "/bucket/demos/", recursive=True)
    yield folder
    memory.rm("/bucket", recursive=True)


def entry_of(config: Config) -> EntryManifest:
    return prepare(config).entries["train"][0]


def samples_of(config: Config, entry: EntryManifest, record: int) -> list[Sample]:
    """As a loader's worker reads them."""
    dataset = make_dataset(config.data)
    with dataset.reading():
        shard = dataset.local(Path(entry.shards[int(entry.shard_index[record])]))
        return list(dataset.read(shard, int(entry.offsets[record]), int(entry.sizes[record])))


@pytest.mark.long
@pytest.mark.parametrize(
    "below", ["demos", "demos/", "demos/*.jsonl", "demos/more.jsonl", "*/demos.jsonl", "**/*.jsonl"]
)
def test_fingerprints_are_those_of_the_local_copy(bucket: Path, config: MakeConfig, below: str) -> None:
    local = entry_of(config(f"{bucket.parent}/{below}"))
    for cache in ("one", "two"):
        url = config(f"memory://bucket/{below}", cache=cache)
        entry = entry_of(url)
        assert entry.fingerprint == local.fingerprint
        assert entry.path == f"memory://bucket/{below}"
        (first, *_), (expected, *_) = samples_of(url, entry, 1), samples_of(config(bucket), local, 1)
        assert np.array_equal(first.images[0], expected.images[0])
        assert verify([entry], make_dataset(url.data), processes=1, progress=False) == []


def test_shards_are_cut_as_local_ones(bucket: Path, config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 300)
    local, remote = entry_of(config(bucket)), entry_of(config("memory://bucket/demos"))
    assert remote.fingerprint == local.fingerprint
    assert remote.statistics is not None
    assert remote.statistics.to_json() == local.statistics.to_json()  # type: ignore[union-attr]
    assert entry_of(config("memory://bucket/demos")).fingerprint == local.fingerprint


def test_states_in_the_npz_are_fetched_for_their_scale_only_where_no_row_has_them(
    served: HttpFiles, config: MakeConfig
) -> None:
    demos = write_demonstrations(served.folder / "demos", [3, 5])
    for number, length in enumerate((3, 5)):
        path = demos.parent / f"traj_{number}" / "obs.npz"
        with np.load(path) as npz:
            rgb = npz["rgb"]
        np.savez(path, rgb=rgb, state=np.arange(length * 2.0).reshape(length, 2) + number)
    rows = [json.loads(line) for line in demos.read_text().splitlines()]
    rows[0]["states"] = [[7.0, 8.0]] * 3
    demos.write_text("".join(json.dumps(row) + "\n" for row in rows))
    local = entry_of(config(demos, cache="local", state="text"))
    url = config(served.url_of("demos/demos.jsonl"), state="text")
    entry = entry_of(url)
    assert served.gets == {"demos/demos.jsonl": 1, "demos/traj_1/obs.npz": 1}
    assert local.states is not None
    assert entry.states is not None
    assert entry.states.to_json() == local.states.to_json()
    assert entry.fingerprint == local.fingerprint
    states = [sample.state.tolist() for sample in samples_of(url, entry, 1) if sample.state is not None]
    assert states == [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]]


def test_what_is_unchanged_is_not_fetched(served: HttpFiles, config: MakeConfig) -> None:
    demos = write_demonstrations(served.folder / "demos", [3, 5])
    urls = served.url_of("demos/demos.jsonl"), served.url_of("demos/other.jsonl")
    (demos.parent / "other.jsonl").write_text(demos.read_text().splitlines()[0] + "\n")
    before = entry_of(config(*urls))
    assert served.gets == {"demos/demos.jsonl": 1, "demos/other.jsonl": 1}
    for file in (Path(before.folder).parents[3] / "cache" / "remote").rglob("*.jsonl"):
        file.unlink()  # as if others had needed the room
    assert entry_of(config(*urls)).fingerprint == before.fingerprint
    assert sum(served.gets.values()) == 2
    (demos.parent / "other.jsonl").write_text(demos.read_text().splitlines()[1] + "\n")
    changed = prepare(config(*urls)).entries["train"]
    assert (changed[0].fingerprint, changed[1].total_samples) == (before.fingerprint, 5)
    assert served.gets == {"demos/demos.jsonl": 1, "demos/other.jsonl": 2}


def test_of_several_shards_only_the_changed_one_is_fetched(config: MakeConfig, bucket: Path) -> None:
    url = config(f"file://{bucket}")
    before = entry_of(url)
    for shard in before.shards:
        Path(shard).unlink()
    (bucket / "more.jsonl").write_text((bucket / "demos.jsonl").read_text().splitlines()[0] + "\n")
    after = entry_of(url)
    assert (before.num_records, after.num_records) == (4, 3)
    assert [Path(shard).exists() for shard in after.shards] == [False, True]


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["../secret.npz", "/bucket/secret.npz", "memory://bucket/secret.npz", "a/../../secret.npz"]
)
def test_nothing_outside_the_root_is_fetched(config: MakeConfig, bucket: Path, name: str) -> None:
    memory = fsspec.filesystem("memory", skip_instance_cache=True)
    row = {"obs_path": name, "task": "PickCube-v1", "actions": [[0.0] * 7]}
    memory.pipe("/bucket/demos/one.jsonl", json.dumps(row).encode())
    memory.pipe("/bucket/secret.npz", b"secret")
    url = config("memory://bucket/demos/one.jsonl")
    entry = entry_of(url)
    with pytest.raises(
        DataError, match=r"leads outside .*memory-.*/bucket/demos, and nothing outside|is a URL: a path relative"
    ):
        samples_of(url, entry, 0)
    assert not list((bucket.parent / "cache").rglob("secret.npz"))


def test_data_root_is_a_url_for_remote_data(config: MakeConfig, bucket: Path) -> None:
    memory = fsspec.filesystem("memory", skip_instance_cache=True)
    row = {"obs_path": "../demos/traj_0/obs.npz", "task": "PickCube-v1", "actions": [[0.0] * 7] * 3}
    memory.pipe("/bucket/lists/one.jsonl", json.dumps(row).encode())
    url = "memory://bucket/lists/one.jsonl"
    narrow, wide = config(url), config(url, data_root="memory://bucket")
    entry = entry_of(narrow)
    with pytest.raises(DataError, match="leads outside"):
        samples_of(narrow, entry, 0)
    assert len(samples_of(wide, entry, 0)) == 3
    assert len(samples_of(config(bucket, url, data_root="memory://bucket"), entry_of(config(bucket)), 0)) == 3


USERS = '''
from loader_service.sources.base import BaseSFTDataset, Sample, ScannedRecord

class Captions(BaseSFTDataset):
    """A row is a line `question|file`, the answer is in the file beside the shard."""

    shard_patterns = ("*.txt",)

    def scan(self, shard):
        for row, line in enumerate(shard.read_text().splitlines()):
            yield ScannedRecord(offset=row, size=1, num_samples=1)

    def read(self, shard, offset, size):
        question, name = shard.read_text().splitlines()[offset].split("|")
        yield Sample(instruction=question, answer=self.local(shard.parent / name).read_text())
'''


def test_a_users_own_class(config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_remote_captions.py").write_text(USERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_text("what?|answer.md\n")
    (data / "answer.md").write_text("a cube")
    local = config(data, dataset_type="my_remote_captions:Captions")
    remote = config(f"file://{data}", dataset_type="my_remote_captions:Captions")
    assert entry_of(local).fingerprint == entry_of(remote).fingerprint
    for one in (local, remote):
        (sample,) = samples_of(one, entry_of(one), 0)
        assert (sample.instruction, sample.answer) == ("what?", "a cube")
    sys.modules.pop("my_remote_captions", None)


@pytest.mark.process
def test_local_data_imports_nothing_of_it(bucket: Path) -> None:
    program = (
        "import sys; import loader_service.server.command, loader_service.sources.lerobot.dataset\n"
        "from loader_service.sources.base import make_dataset; from stoker_proto.config import DataConfig\n"
        f"data = make_dataset(DataConfig(dataset_type='chat', train_data_paths=({str(bucket)!r},), max_seq_len=8))\n"
        "data.locate(data.config.train_data_paths[0])\n"
        "print([name for name in ('fsspec', 'aiohttp', 'sqlite3', 'loader_service.remote.store') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_local_data_touches_nothing_of_it(config: MakeConfig, bucket: Path) -> None:
    dataset: BaseSFTDataset = make_dataset(config(bucket).data)
    assert dataset.remote is None
    path = Path("/data/x.npz")
    assert dataset.local(path) is path
    entry_of(config(bucket))
    assert not (bucket.parent / "cache" / "remote").exists()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("memory://bucket/none", r"data\.train_data_paths\[0\]: 'memory://bucket/none' names no shard"),
        ("memory://bucket/none/*.jsonl", "names no shard"),
        ("s9://bucket/demos", r"data\.train_data_paths\[0\]: s9:// in the data paths: fsspec knows no such protocol"),
        (
            "sftp://host/demos",
            r"sftp:// in the data paths: .*paramiko.*: install the package of its fsspec file system",
        ),
        ("az://bucket/demos", r"az:// in the data paths: Install adlfs to access .*: pip install adlfs"),
    ],
)
def test_what_cannot_be_had_is_named(config: MakeConfig, bucket: Path, url: str, said: str) -> None:
    package = {"sftp": "paramiko", "az": "adlfs"}.get(url.partition(":")[0])
    if package is not None and importlib.util.find_spec(package) is not None:
        pytest.skip(f"NOT TESTED: {package} is installed")
    with pytest.raises(ConfigError, match=said):
        prepare(config(url))


def test_a_lerobot_data_set_is_not_left_out_in_silence(tmp_path: Path, config: MakeConfig) -> None:
    pytest.importorskip("pyarrow", reason="NOT TESTED: LeRobot data sets need pyarrow; pip install 'stoker[lerobot]'")
    from tests.loader_service.sources.lerobot.files import write_lerobot

    memory = fsspec.filesystem("memory", skip_instance_cache=True)

    def put(name: str) -> None:
        folder = write_lerobot(tmp_path / name, [3], videos=())
        memory.put(f"{folder}/", f"/robots/{name}/", recursive=True)

    def total(below: str) -> int:
        return entry_of(config(f"memory://robots{below}", dataset_type="lerobot")).total_samples

    try:
        for name in ("arm-a", "arm-b"):
            put(name)
        assert total("") == total("/*") == 6
        put("user/arm-c")
        for below in ("", "/*"):
            with pytest.raises(ConfigError, match=r"user/arm-c' is a LeRobot data set that the entry does not reach"):
                total(below)
        assert total("/**") == 9
        memory.rm("/robots/user", recursive=True)
        memory.rm("/robots/arm-b/meta", recursive=True)
        for below in ("", "/*"):
            with pytest.raises(ConfigError, match=r"arm-b' has data/, and no meta/info\.json: fetch the rest"):
                total(below)
    finally:
        memory.rm("/robots", recursive=True)
