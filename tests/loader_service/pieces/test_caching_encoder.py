"""Records kept on disk: the same samples as encoded ones, and another key for whatever changes their bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loader_service.disk_cache.folder import check_disk_cache, disk_cache_folder
from loader_service.disk_cache.store import DiskCache
from loader_service.manifest import EntryManifest
from loader_service.pieces import caching_encoder
from loader_service.pieces.caching_encoder import CachingEncoder
from loader_service.pieces.encoder import RecordEncoder
from loader_service.pieces.excluded import Excluded
from loader_service.pieces.piece import EncodedRecord, EncodedSample, Outcome
from loader_service.pieces.stored_record import from_bytes, to_bytes
from loader_service.prepare.run import Prepared, ScanOptions, prepare
from loader_service.sources.mani_openpi import ManiOpenPIDataset
from stoker_proto.config import Config, LoaderConfig
from stoker_proto.config.reader import load_config
from stoker_proto.errors import ConfigError, DataError, FetchError
from stoker_proto.processor import Processor
from tests.end_to_end.fleet import write_config, write_demonstrations
from tests.tiny_models import write_model_folder

NUM = 3


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "model").mkdir()
    demos = write_demonstrations(tmp_path / "demos", [4] * NUM)
    return load_config(write_config(tmp_path, write_model_folder(tmp_path / "model"), [demos]), [])


class Counting(CachingEncoder):
    """Counts the records that it had to encode."""

    num_encoded = 0

    def _read(self, manifest: EntryManifest, number: int, epoch: int) -> Any:
        self.num_encoded += 1
        return super()._read(manifest, number, epoch)


def encoder_of(config: Config, prepared: Prepared, folder: Path) -> Counting:
    processor = Processor.build(config, prepared.codec, prepared.states)
    return Counting(config.data, processor, config.loader, Excluded.read(config.data), DiskCache(folder, 64 << 20))


def plain(record: Outcome) -> Any:
    """The record as literals, each with its type."""
    assert isinstance(record, EncodedRecord)
    samples = [
        (
            sample.input_ids.dtype, sample.input_ids.tolist(), sample.supervised.dtype, sample.supervised.tolist(),
            [bytes(image) for image in sample.images], type(sample.timestep), sample.timestep,
            *((None if a is None else (a.dtype, a.shape, a.tobytes())) for a in (sample.action, sample.auxiliary)),
        )
        for sample in record.samples
    ]  # fmt: skip
    return samples, record.error, record.size_bytes, record.excluded


def encoded_in(config: Config, folder: Path, *, split: str = "train", epoch: int = 0) -> tuple[list[Any], int]:
    """Records of a new process, and how many of them were encoded. They are those without a cache."""
    prepared = prepare(config)
    encoder = encoder_of(config, prepared, folder)
    manifest = prepared.entries[split][0]
    places = [(manifest, number) for number in range(manifest.num_records)]
    found = [plain(outcome) for outcome in encoder.encode_all(places, epoch)]
    without = RecordEncoder(config.data, encoder.processor, config.loader)
    assert found == [plain(outcome) for outcome in without.encode_all(places, epoch)]
    encoder.disk.close()
    return found, encoder.num_encoded


def with_data(config: Config, **keys: Any) -> Config:
    return replace(config, data=replace(config.data, **keys))


def image(config: Config, **keys: Any) -> Config:
    return with_data(config, image=replace(config.data.image, **keys))


def action(config: Config, **keys: Any) -> Config:
    return with_data(config, action=replace(config.data.action, **keys))


def test_a_later_process_encodes_nothing_and_has_the_same_samples(config: Config, tmp_path: Path) -> None:
    first, encoded = encoded_in(config, tmp_path / "disk")
    assert encoded == NUM
    for epoch in (0, 7):
        assert encoded_in(config, tmp_path / "disk", epoch=epoch) == (first, 0)


def changes(config: Config, tmp_path: Path) -> Iterator[tuple[str, Config]]:
    """Settings of which each gives other bytes, or may."""
    yield "quality", image(config, quality=80)
    yield "transport", image(config, transport="jpeg")
    yield "padding to a square", image(config, pad_to_square=True)
    yield "chunk", action(config, chunk=3)
    yield "padding", action(config, chunk=3, learn_padding=False)
    yield "bins", action(config, codec_options={"num_bins": 64})
    yield "noops", action(config, drop_noops=True)
    yield "length", with_data(config, max_seq_len=300)
    yield "instruction", with_data(config, task_table=str(task_table(tmp_path)))
    yield "device", replace(config, loader=LoaderConfig(device="torch"))


def task_table(folder: Path) -> Path:
    file = folder / "tasks.json"
    file.write_text(json.dumps({"PickCube-v1": "take the cube"}))
    return file


@pytest.mark.long
def test_each_setting_that_decides_bytes_has_records_of_its_own(config: Config, tmp_path: Path) -> None:
    encoded_in(config, tmp_path / "disk")
    prepared = prepare(config)
    keys = {keys_of(config, prepared, tmp_path)}
    for name, other in changes(config, tmp_path):
        found = keys_of(other, prepare(other), tmp_path)
        assert found not in keys, name
        keys.add(found)
    unchanged = replace(config, loader=LoaderConfig(allow_mixed_devices=True, threads=3))
    assert keys_of(unchanged, prepared, tmp_path) in keys
    order = with_data(
        config, order=replace(config.data.order, lanes=2, seed=9), on_bad_sample=config.data.on_bad_sample
    )
    assert keys_of(order, prepared, tmp_path) in keys


def keys_of(config: Config, prepared: Prepared, tmp_path: Path) -> tuple[bytes | None, ...]:
    encoder = encoder_of(config, prepared, tmp_path / "disk")
    found = tuple(encoder._key(prepared.entries["train"][0], number) for number in range(NUM))
    assert None not in found
    assert len(set(found)) == NUM
    return found


@pytest.mark.parametrize("what", ["code", "library"])
def test_other_code_and_other_libraries_have_records_of_their_own(
    what: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded_in(config, tmp_path / "disk")
    if what == "code":
        monkeypatch.setattr(caching_encoder, "code_fingerprint", lambda: "0" * 64)
    else:
        monkeypatch.setattr(caching_encoder, "library_versions", lambda: iter([("tokenizers", "9.9")]))
    assert encoded_in(config, tmp_path / "disk")[1] == NUM


def test_the_code_fingerprint_is_that_of_the_files_that_make_records(tmp_path: Path) -> None:
    names = {file.name for root, file in caching_encoder.code_files()}
    assert {"encoder.py", "mani_openpi.py", "npz.py", "processor.py", "transport.py", "bins.py", "paths.py"} <= names
    assert "server.py" not in names
    assert len(caching_encoder.code_fingerprint()) == 64


def test_another_npz_is_refused_as_without_a_cache_and_a_touched_one_is_read_again(
    config: Config, tmp_path: Path
) -> None:
    first, _ = encoded_in(config, tmp_path / "disk")
    files = sorted(Path(config.data.train_data_paths[0]).parent.rglob("*.npz"))
    os.utime(files[0], ns=(1, 1))  # its bytes are compared, and it is the same
    assert encoded_in(config, tmp_path / "disk") == (first, 1)
    prepared = prepare(config)  # as the loader holds it while the file changes
    encoder = encoder_of(config, prepared, tmp_path / "disk")
    original, times = files[1].read_bytes(), files[1].stat()
    with np.load(files[1]) as saved:
        frames = 255 - saved["rgb"]
    np.savez_compressed(files[1], rgb=frames)
    with pytest.raises(FetchError, match="changed since it was scanned"):
        encoder.encode(prepared.entries["train"][0], 1, 0)
    files[2].unlink()
    with pytest.raises(DataError, match="there is no such file"):
        encoder.encode(prepared.entries["train"][0], 2, 0)
    encoder.disk.close()
    write_demonstrations(tmp_path / "again", [4] * NUM)
    (tmp_path / "again" / "traj_2" / "obs.npz").replace(files[2])
    rescanned = prepare(config, scan=ScanOptions(rescan=True))
    again = encoder_of(config, rescanned, tmp_path / "disk")
    changed = again.encode(rescanned.entries["train"][0], 1, 0)
    assert plain(changed) != first[1]
    assert plain(again.encode(rescanned.entries["train"][0], 2, 0)) == first[2]
    files[1].write_bytes(original)  # its record is kept, and the manifest knows the other one
    os.utime(files[1], ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(FetchError, match="changed since it was scanned"):
        again.encode(rescanned.entries["train"][0], 1, 0)


def test_a_jsonl_that_changes_while_it_is_served_is_refused(config: Config, tmp_path: Path) -> None:
    encoded_in(config, tmp_path / "disk")
    prepared = prepare(config)
    encoder = encoder_of(config, prepared, tmp_path / "disk")
    shard = Path(config.data.train_data_paths[0])
    shard.write_text(shard.read_text() + "\n")
    with pytest.raises(FetchError, match=r"demos\.jsonl: it changed since it was scanned"):
        encoder.encode(prepared.entries["train"][0], 1, 0)


def test_augmented_frames_are_kept_of_validation_only(config: Config, tmp_path: Path) -> None:
    train = config.data.train_data_paths
    augmented = with_data(config, augment=replace(config.data.augment, enabled=True), val_data_paths=train)
    for split, again in (("train", NUM), ("val", 0)):
        assert encoded_in(augmented, tmp_path / "disk", split=split)[1] == NUM
        assert encoded_in(augmented, tmp_path / "disk", split=split)[1] == again


def test_validation_learns_the_padding_that_training_hides(config: Config, tmp_path: Path) -> None:
    hiding = with_data(action(config, chunk=3, learn_padding=False), val_data_paths=config.data.train_data_paths)
    assert encoded_in(hiding, tmp_path / "disk")[0] != encoded_in(hiding, tmp_path / "disk", split="val")[0]


def test_excluded_samples_stay_without_labels(config: Config, tmp_path: Path) -> None:
    first, _ = encoded_in(config, tmp_path / "disk")
    offset = int(prepare(config).entries["train"][0].offsets[1])
    (tmp_path / "exclude.txt").write_text(f"data.train_data_paths[0] {offset} 2 demos.jsonl\n")
    excluding = with_data(config, exclude=str(tmp_path / "exclude.txt"))
    found, encoded = encoded_in(excluding, tmp_path / "disk")
    assert encoded == 1
    assert found[1][3] == frozenset({2})
    assert not any(found[1][0][2][3])
    assert encoded_in(excluding, tmp_path / "disk") == (found, 0)
    assert encoded_in(config, tmp_path / "disk") == (first, 0)


def test_bad_records_are_not_kept(config: Config, tmp_path: Path) -> None:
    npz = sorted(Path(config.data.train_data_paths[0]).parent.rglob("*.npz"))[0]
    npz.write_bytes(b"no archive")
    skipping = with_data(config, on_bad_sample="skip")
    for expected in (NUM, 1):
        found, encoded = encoded_in(skipping, tmp_path / "disk")
        assert encoded == expected
        assert "obs.npz" in found[0][1]


def test_bytes_that_are_no_record_are_damaged_and_encoded_again(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = encoded_in(config, tmp_path / "disk")
    prepared = prepare(config)
    encoder = encoder_of(config, prepared, tmp_path / "disk")
    manifest = prepared.entries["train"][0]
    key = encoder._key(manifest, 0)
    assert key is not None
    data = encoder.disk.get(key)
    assert data is not None
    for size in range(0, len(data), 7):
        with pytest.raises(ValueError, match=r"shorter than its head|does not end|do not end|do not agree"):
            from_bytes(data[:size])
    other = DiskCache(tmp_path / "other", 64 << 20)
    other.put(key, data[:-1])
    encoder.disk = other
    assert plain(encoder.encode(manifest, 0, 0)) == first[0]
    assert other.counters.damaged == encoder.num_encoded == 1
    assert plain(encoder.encode(manifest, 0, 0)) == first[0]
    assert encoder.num_encoded == 1, "kept anew"


def test_a_record_comes_back_with_all_it_has() -> None:
    def sample(i: int, *, extra: bool) -> EncodedSample:
        rng = np.random.default_rng(i)
        return EncodedSample(
            rng.integers(0, 9, 5 + i).astype(np.int32), rng.integers(0, 2, 5 + i).astype(np.uint8),
            tuple(bytes([i]) * (3 + n) for n in range(i % 3)), rng.normal(size=(2, 7)).astype(np.float32) if extra else None,
            (1 << 40) + i, rng.normal(size=4).astype(np.float32) if extra else None,
        )  # fmt: skip

    for extra in (True, False):
        record = EncodedRecord([sample(i, extra=extra) for i in range(6)], None, 12345, frozenset({1, 4}))
        data = to_bytes(record)
        assert data is not None
        assert plain(from_bytes(data)) == plain(record)
        assert from_bytes(data).is_stored
    mixed = EncodedRecord([sample(1, extra=True), sample(2, extra=False)], None, 1)
    assert to_bytes(mixed) is None
    assert to_bytes(EncodedRecord([sample(0, extra=True)], None, 1)) is None, "no images"
    assert to_bytes(EncodedRecord(error="bad", size_bytes=1)) is None


def test_a_class_that_does_not_say_what_its_records_are_made_of_is_not_kept(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(ManiOpenPIDataset, "content")
    for _ in range(2):
        assert encoded_in(config, tmp_path / "disk")[1] == NUM


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_episodes_of_videos_are_kept_and_another_video_is_another_record(
    version: str, config: Config, tmp_path: Path
) -> None:
    pytest.importorskip("av", reason="NOT TESTED: LeRobot data sets need av; pip install 'stoker[lerobot]'")
    from tests.loader_service.sources.lerobot.files import write_lerobot

    front = ["observation.images.front"]
    for name, length in (("set", 6), ("other", 7)):
        write_lerobot(
            tmp_path / name,
            [4, 5, length],
            version=version,
            videos=front,
            rows_per_data_file=9,
            episodes_per_video_file=1,
        )
    lerobot = with_data(config, dataset_type="lerobot", train_data_paths=(str(tmp_path / "set"),))
    first, encoded = encoded_in(lerobot, tmp_path / "disk")
    assert encoded == 3
    assert encoded_in(lerobot, tmp_path / "disk") == (first, 0)
    prepared = prepare(lerobot)
    encoder = encoder_of(lerobot, prepared, tmp_path / "disk")
    lost, other = (sorted((tmp_path / name).glob("videos/**/*.mp4"))[2] for name in ("set", "other"))
    other.replace(lost)
    with pytest.raises(FetchError, match=r"the NPZ or the video of the record at .* changed since it was scanned"):
        encoder.encode(prepared.entries["train"][0], 2, 0)


def test_images_in_files_of_their_own_are_not_kept(config: Config, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="NOT TESTED: LeRobot data sets need av; pip install 'stoker[lerobot]'")
    from tests.loader_service.sources.lerobot.files import write_lerobot

    write_lerobot(tmp_path / "set", [4, 5], videos=(), images=["observation.images.front"])
    lerobot = with_data(config, dataset_type="lerobot", train_data_paths=(str(tmp_path / "set"),))
    for _ in range(2):
        assert encoded_in(lerobot, tmp_path / "disk")[1] == 2


def test_the_folder_and_its_check(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert disk_cache_folder(config) is None
    on = replace(config, loader=LoaderConfig(disk_cache_gb=0.5))
    assert disk_cache_folder(on) == (tmp_path / "cache" / "encoded").resolve()
    assert disk_cache_folder(with_data(on, cache_dir=None)) == (tmp_path / "home/stoker/encoded").resolve()
    named = replace(on, loader=replace(on.loader, disk_cache_dir=str(tmp_path / "named")))
    assert disk_cache_folder(named) == (tmp_path / "named").resolve()
    check_disk_cache(named)
    assert list((tmp_path / "named").iterdir()) == []
    (tmp_path / "file").write_text("in the way")
    blocked = replace(on, loader=replace(on.loader, disk_cache_dir=str(tmp_path / "file" / "cache")))
    with pytest.raises(ConfigError) as raised:
        check_disk_cache(blocked)
    assert str(raised.value) == (
        f"loader.disk_cache_dir: {tmp_path.resolve()}/file/cache cannot be written (Not a directory): name another folder, or "
        "set loader.disk_cache_gb to 0"
    )
