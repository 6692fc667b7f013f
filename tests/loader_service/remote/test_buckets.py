# ruff: noqa: E402
"""`s3://` and `gs://` against servers of these APIs on loopback: the same samples as from a local folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# gcsfs asks over gRPC and TLS whether a bucket is of a special kind, which the server on loopback does not speak. It reads this
# when it is imported.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

for name in ("s3fs", "gcsfs", "moto", "flask", "flask_cors", "gcp_storage_emulator"):
    pytest.importorskip(name, reason=f"NOT TESTED: s3:// and gs:// need {name}; pip install 'stoker[dev]'")

from loader_service.manifest import EntryManifest
from loader_service.pieces.encoder import RecordEncoder
from loader_service.pieces.piece import EncodedRecord
from loader_service.prepare.run import prepare
from loader_service.remote.shared_store import remote_store
from loader_service.sources.base import Sample, make_dataset
from stoker_proto.config import ActionConfig, Config, DataConfig, ModelConfig, TrainerConfig
from stoker_proto.config.remote import RemoteConfig
from stoker_proto.errors import FetchError, StokerError
from stoker_proto.processor import Processor
from tests.end_to_end.fleet import write_demonstrations
from tests.loader_service.remote.bucket_servers import (
    ACCESS_KEY,
    SECRET_KEY,
    BucketServer,
    gcs_server,
    s3_server,
)
from tests.loader_service.sources.lerobot.files import write_lerobot
from tests.tiny_models import make_config, write_model_folder

pytestmark = pytest.mark.slow

MakeConfig = Callable[..., Config]


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those of the loopback server, and none of the user's: nothing else is asked for any."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS", "STORAGE_EMULATOR_HOST"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["s3", "gs"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BucketServer]:
    """An empty bucket of each kind."""
    with s3_server() if request.param == "s3" else gcs_server(tmp_path / "gcs") as started:
        yield started


@pytest.fixture
def config(tmp_path: Path, server: BucketServer) -> MakeConfig:
    """A config of these entries; other keys are those of `data`, and `remote` those of `data.remote`."""

    def make(*paths: str | Path, remote: dict[str, Any] | None = None, **data: Any) -> Config:
        keys = {"min_free_gb": 0, "storage_options": {server.protocol: server.options}, **(remote or {})}
        return Config(
            model=ModelConfig(base_model_path="unused"),
            data=DataConfig(
                train_data_paths=tuple(map(str, paths)),
                cache_dir=str(tmp_path / "cache"),
                remote=RemoteConfig(**keys),
                **{
                    "dataset_type": "mani_openpi",
                    "max_seq_len": 64,
                    "action": ActionConfig(codec="bins"),
                    **data,
                },
            ),
            trainer=TrainerConfig(micro_batch_size=1, global_batch_size=1, lr=1e-4),
        )

    return make


def model_config(tmp_path: Path) -> Config:
    """Of a processor for these demonstrations."""
    (tmp_path / "model").mkdir()
    return make_config(
        write_model_folder(tmp_path / "model"), "data.dataset_type=mani_openpi", "data.train_data_paths=[x]"
    )


def entry_of(config: Config) -> EntryManifest:
    return prepare(config).entries["train"][0]


def samples_of(config: Config, entry: EntryManifest) -> list[Sample]:
    """All of the entry, as loaders' workers read them."""
    dataset, found = make_dataset(config.data), []
    for record in range(len(entry.offsets)):
        with dataset.reading():
            shard = dataset.local(Path(entry.shards[int(entry.shard_index[record])]))
            found += list(dataset.read(shard, int(entry.offsets[record]), int(entry.sizes[record])))
    return found


def assert_same(found: list[Sample], expected: list[Sample]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.instruction == other.instruction
        np.testing.assert_array_equal(one.action, other.action)
        for image, right in zip(one.images, other.images, strict=True):
            np.testing.assert_array_equal(image, right)


@pytest.mark.parametrize("below", ["demos", "demos/*.jsonl", "**/demos.jsonl"])
def test_demonstrations_are_those_of_the_local_folder(
    server: BucketServer, config: MakeConfig, tmp_path: Path, below: str
) -> None:
    folder = tmp_path / "here" / "demos"
    write_demonstrations(folder, [3, 5])
    server.put_folder(folder, "demos")
    local, remote = config(folder), config(server.url(below))
    entry = entry_of(remote)
    assert entry.num_samples.tolist() == [3, 5]
    assert entry.statistics.to_json() == entry_of(local).statistics.to_json()  # type: ignore[union-attr]
    assert_same(samples_of(remote, entry), samples_of(local, entry_of(local)))


def test_a_lerobot_data_set_is_that_of_the_local_folder(
    server: BucketServer, config: MakeConfig, tmp_path: Path
) -> None:
    root = write_lerobot(tmp_path / "bridge", [4, 9, 6], size=(32, 48))
    server.put_folder(root, "sets/bridge")
    local = config(root, dataset_type="lerobot")
    for below in ("sets/bridge", "sets", "sets/*"):
        remote = config(server.url(below), dataset_type="lerobot")
        entry = entry_of(remote)
        assert entry.num_samples.tolist() == [4, 9, 6]
        assert_same(samples_of(remote, entry), samples_of(local, entry_of(local)))


def forget_copies(config: Config) -> None:
    """As on a host that has fetched nothing yet: what was scanned stays known."""
    store = remote_store(config.data)
    assert store is not None
    for file in store.folder.rglob("*"):
        if file.suffix in (".jsonl", ".npz"):
            file.unlink()


def test_an_outage_is_no_bad_data_and_ends_by_itself(server: BucketServer, config: MakeConfig, tmp_path: Path) -> None:
    folder = tmp_path / "here" / "demos"
    write_demonstrations(folder, [3, 5])
    server.put_folder(folder, "demos")
    remote = config(server.url("demos"), on_bad_sample="skip")
    prepared = prepare(remote)
    entry = prepared.entries["train"][0]
    expected = samples_of(remote, entry)
    hasty = config(server.url("demos"), remote={"deadline_s": 1.0}, on_bad_sample="skip")
    processor = Processor.build(model_config(tmp_path), prepared.codec)
    encoder = RecordEncoder(hasty.data, processor)
    encoder.preload([entry])
    forget_copies(remote)
    server.stop()
    try:
        outcomes = encoder.encode_all([(entry, 0), (entry, 1)], 0)
    finally:
        server.start()
    assert [type(outcome) for outcome in outcomes] == [FetchError, FetchError]
    assert f"{server.url('demos/demos.jsonl')}: " in str(outcomes[0])
    assert "is it reachable from this host? For slow storage raise data.remote.deadline_s" in str(outcomes[0])
    assert_same(samples_of(remote, entry), expected)
    outcomes = RecordEncoder(remote.data, processor).encode_all([(entry, 0), (entry, 1)], 0)
    assert [len(outcome.samples) for outcome in outcomes if isinstance(outcome, EncodedRecord)] == [3, 5]


def test_an_object_that_changed_is_neither_mixed_in_nor_skipped(
    server: BucketServer, config: MakeConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "here" / "demos"
    write_demonstrations(folder, [3, 5])
    server.put_folder(folder, "demos")
    remote = config(server.url("demos"), on_bad_sample="skip")
    prepared = prepare(remote)
    entry = prepared.entries["train"][0]
    encoder = RecordEncoder(remote.data, Processor.build(model_config(tmp_path), prepared.codec))
    changed = (folder / "demos.jsonl").read_text().replace('"actions": [[', '"actions": [[0.0', 1)
    server.put("demos/demos.jsonl", changed.encode())
    forget_copies(remote)
    [outcome] = encoder.encode_all([(entry, 0)], 0)
    assert type(outcome) is FetchError
    assert "demos.jsonl: it changed since it was scanned: start the loader again" in str(outcome)
    assert entry_of(remote).fingerprint != entry.fingerprint


def test_a_wrong_credential_is_told_at_once(server: BucketServer, config: MakeConfig, tmp_path: Path) -> None:
    folder = tmp_path / "here" / "demos"
    write_demonstrations(folder, [3])
    server.put_folder(folder, "demos")
    remote = config(server.url("demos"), remote={"deadline_s": 600.0})  # a retry would take as long as this test may
    with (
        server.refusing(),
        pytest.raises(StokerError, match="check the URL and the credentials in the environment") as told,
    ):
        prepare(remote)
    assert server.url("demos") in str(told.value)
    assert prepare(remote).entries["train"][0].num_records == 1
