"""Files that a record only names: what the scan keeps of them, and what is compared when they are opened."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loader_service.pieces.encoder import RecordEncoder
from loader_service.prepare.run import Prepared, ScanOptions, prepare
from loader_service.sources.named_files import video_content
from stoker_proto.config import Config
from stoker_proto.config.reader import load_config
from stoker_proto.errors import ConfigError, DataError, FetchError
from stoker_proto.processor import Processor
from tests.end_to_end.fleet import write_config, write_demonstrations
from tests.loader_service.sources.lerobot.files import write_lerobot
from tests.tiny_models import write_model_folder


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "model").mkdir()
    demos = write_demonstrations(tmp_path / "here" / "demos", [4] * 3)
    return load_config(write_config(tmp_path, write_model_folder(tmp_path / "model"), [demos]), [])


def encoder_of(config: Config, prepared: Prepared) -> RecordEncoder:
    return RecordEncoder(config.data, Processor.build(config, prepared.codec))


def npz_files(config: Config) -> list[Path]:
    return sorted(Path(config.data.train_data_paths[0]).parent.rglob("*.npz"))


def rewrite(path: Path, *, invert: bool, compress: bool = False) -> None:
    with np.load(path) as saved:
        arrays = {name: 255 - saved[name] if invert and name == "rgb" else saved[name] for name in saved.files}
    (np.savez_compressed if compress else np.savez)(path, **arrays)


def copied(config: Config, folder: Path) -> Config:
    here = Path(config.data.train_data_paths[0])
    shutil.copytree(here.parent, folder, ignore=shutil.ignore_patterns(".stoker"))
    return replace(config, data=replace(config.data, train_data_paths=(str(folder / here.name),)))


def identity(prepared: Prepared) -> str:
    manifest = prepared.entries["train"][0]
    return f"{manifest.fingerprint} {manifest.files_fingerprint}"


def test_equal_lines_with_other_pixels_are_other_data(config: Config, tmp_path: Path) -> None:
    here = prepare(config)
    same, other = copied(config, tmp_path / "same"), copied(config, tmp_path / "other")
    assert identity(prepare(same)) == identity(here), "the time of a copy must not matter"
    rewrite(npz_files(other)[1], invert=True)
    assert identity(prepare(other)) != identity(here)
    assert prepare(other).entries["train"][0].total_samples == 12


def test_how_an_npz_is_compressed_does_not_matter(config: Config, tmp_path: Path) -> None:
    here = prepare(config)
    other = copied(config, tmp_path / "other")
    rewrite(npz_files(other)[0], invert=False, compress=True)
    assert identity(prepare(other)) == identity(here)


@pytest.mark.long
def test_an_npz_that_changes_after_the_scan_is_not_served(config: Config) -> None:
    prepared = prepare(config)
    before, manifest = identity(prepared), prepared.entries["train"][0]
    rewrite(npz_files(config)[1], invert=True)
    assert identity(prepare(config)) == before, "no NPZ is opened at a start"
    encoder = encoder_of(config, prepared)
    assert len(encoder.encode(manifest, 0, 0).samples) == 4
    with pytest.raises(
        FetchError, match="changed since it was scanned: put it back as it was, or run `loader-prepare --rescan`"
    ):
        encoder.encode(manifest, 1, 0)
    again = prepare(config, scan=ScanOptions(rescan=True))
    assert identity(again) != before
    assert len(encoder_of(config, again).encode(again.entries["train"][0], 1, 0).samples) == 4


def test_an_npz_that_was_touched_has_its_checksums_compared(config: Config) -> None:
    """The directory of a stored NPZ does not show a flipped bit of its data."""
    path = npz_files(config)[0]
    rewrite(path, invert=False)
    prepared = prepare(config)
    manifest = prepared.entries["train"][0]
    encoder = encoder_of(config, prepared)
    os.utime(path, ns=(1, 1))
    assert len(encoder.encode(manifest, 0, 0).samples) == 4
    data = bytearray(path.read_bytes())
    with np.load(path) as saved:
        pixels = saved["rgb"].tobytes()
    data[data.index(pixels) + 1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"its CRC-32 is .* bits have flipped"):
        encoder.encode(manifest, 0, 0)


def test_an_npz_that_cannot_be_opened_is_noted_by_the_scan(config: Config) -> None:
    npz_files(config)[2].unlink()
    manifest = prepare(config).entries["train"][0]
    assert dict(manifest.notes) == {"its NPZ cannot be opened: training will fail on it, or skip it": 1}
    assert manifest.files.tolist()[2] == 1
    assert (manifest.total_samples, manifest.num_bad) == (12, 0)


@pytest.mark.parametrize("kind", ["mani_openpi", "lerobot"])
def test_a_table_or_an_index_that_changes_while_a_loader_runs_is_not_served(
    kind: str, config: Config, tmp_path: Path
) -> None:
    """By a worker that starts then. Policy `skip` must not skip what may be sound."""
    table = tmp_path / "tasks.yaml"
    table.write_text("push: push the cube\n")
    data = replace(config.data, task_table=str(table), on_bad_sample="skip")
    if kind == "lerobot":
        root = write_lerobot(tmp_path / "set", [4, 3], version="v2.1", videos=(), images=())
        table = root / "meta/tasks.jsonl"
        data = replace(data, dataset_type=kind, train_data_paths=(str(root),), val_data_paths=())
    config = replace(config, data=data)
    prepared = prepare(config)
    manifest, before = prepared.entries["train"][0], table.read_text()
    running = encoder_of(config, prepared)
    assert len(running.encode(manifest, 0, 0).samples) == 4
    for content in (before.replace("pu", "Pu"), "{"):
        table.write_text(content)
        assert len(running.encode(manifest, 0, 0).samples) == 4
        with pytest.raises(
            (FetchError, ConfigError), match=r"changed while this loader was running|task_table .* is not YAML"
        ):
            encoder_of(config, prepared).encode(manifest, 0, 0)
    table.write_text(before)
    assert len(encoder_of(config, prepared).encode(manifest, 0, 0).samples) == 4


def test_what_is_compared_of_a_video(tmp_path: Path) -> None:
    def boxes(mdat: bytes, moov: bytes) -> bytes:
        return b"".join(
            (8 + len(body)).to_bytes(4, "big") + kind + body
            for kind, body in ((b"ftyp", b"isom"), (b"mdat", mdat), (b"moov", moov))
        )

    found = {}
    for name, content in {
        "a": boxes(b"frames12", b"sizes 3 5"),
        "copy": boxes(b"frames12", b"sizes 3 5"),
        "longer": boxes(b"frames123", b"sizes 3 5"),
        "sizes": boxes(b"frames12", b"sizes 4 4"),
    }.items():
        (tmp_path / name).write_bytes(content)
        found[name] = video_content(str(tmp_path / name))
    assert found["a"] == found["copy"]
    assert len(set(found.values())) == 3
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe: not a file: a video is expected"):
        video_content(str(tmp_path / "pipe"))
    with pytest.raises(DataError, match="the video cannot be read"):
        video_content(str(tmp_path / "absent"))
