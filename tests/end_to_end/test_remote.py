"""Data behind URLs through real loaders: what is trained is what the same data gives when it lies here."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from stoker_proto.errors import DataError, DeadlineError, StokerError
from tests.end_to_end.fleet import Pulled, pull, run_cli, serving, wait_until, write_config, write_demonstrations
from tests.loader_service.remote.http_files import HttpFiles, http_files
from tests.loader_service.sources.lerobot.files import write_lerobot

COLD_S = 3
"""Ten times what a new process takes for its first file: it imports fsspec and aiohttp meanwhile."""


@pytest.fixture
def served(demos: Path) -> Iterator[HttpFiles]:
    """The demonstrations over HTTP."""
    with http_files(demos.parent) as files:
        yield files


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: Path, demos: Path) -> tuple[Pulled, str]:
    """An epoch of the local data, and the loader's ready line without its address."""
    config = write_config(tmp_path_factory.mktemp("local"), model, [demos])
    with serving(config) as loader:
        return pull(config, [loader.address]), loader.ready_line.split("|", 1)[1]


def remote_config(folder: Path, model: Path, url: str, **data: object) -> Path:
    """Each loader's own folder: its cache is its own, too."""
    folder.mkdir(exist_ok=True)
    data = {"train_data_paths": [url], "remote": {"min_free_gb": 0}, **data}
    return write_config(folder, model, [], **data)


def test_an_epoch_over_http_is_the_local_one(
    tmp_path: Path, model: Path, served: HttpFiles, undisturbed: tuple[Pulled, str]
) -> None:
    """Two loaders on one host share their copies; a third one elsewhere has its own. All of them agree."""
    url = served.url_of("demos.jsonl")
    here = remote_config(tmp_path / "here", model, url)
    elsewhere = remote_config(tmp_path / "elsewhere", model, url)
    with serving(here) as one, serving(here) as two:
        assert one.ready_line.split("|", 1)[1] == undisturbed[1]  # the fingerprint, among others
        assert pull(here, [one.address, two.address]).steps == undisturbed[0].steps
        assert served.gets == {"demos.jsonl": 1, **{f"traj_{i}/obs.npz": 1 for i in range(20)}}
        with serving(elsewhere) as three:
            assert pull(here, [one.address, three.address], ranks=2).steps == undisturbed[0].steps
    served.gets.clear()
    with serving(here) as one:
        assert pull(here, [one.address]).steps == undisturbed[0].steps
    assert not served.gets


def test_a_tiny_budget_and_a_bad_line_change_no_batch(
    tmp_path: Path, model: Path, served: HttpFiles, undisturbed: tuple[Pulled, str]
) -> None:
    config = remote_config(
        tmp_path, model, served.url_of("demos.jsonl"), remote={"min_free_gb": 0, "cache_gb": 2e-6, "deadline_s": 20}
    )
    for i, fault in enumerate(["500", "cut", "short"] * 6):
        served.faults[f"traj_{i}/obs.npz"] = [fault]
    with serving(config, "--set", "loader.cache_mb=1", "--set", "loader.threads=2") as loader:
        assert pull(config, [loader.address]).steps == undisturbed[0].steps
    kept = list((tmp_path / "cache" / "remote").rglob("obs.npz"))
    assert len(kept) < 10
    assert served.gets["demos.jsonl"] == 1  # whoever reads a record holds its shard
    assert (
        served.gets["traj_0/obs.npz"] == 3
    )  # a fault; looked at before serving; given up for others, and fetched again


def test_an_outage_is_waited_for_and_never_skipped(
    tmp_path: Path, model: Path, served: HttpFiles, undisturbed: tuple[Pulled, str]
) -> None:
    """Bad samples may be skipped, and a file that does not come now is none."""
    config = remote_config(
        tmp_path,
        model,
        served.url_of("demos.jsonl"),
        on_bad_sample="skip",
        remote={"min_free_gb": 0, "deadline_s": COLD_S},
    )
    log = tmp_path / "log"
    names = [f"traj_{i}/obs.npz" for i in range(20)]
    with serving(config, "--log-level", "INFO", log=log) as loader:

        def outage(step: int) -> None:
            if step == 2:
                for name in names:
                    served.faults[name].clear()

        for name in names[::3]:
            served.faults[name] = ["503"] * 10_000
        pulled = pull(config, [loader.address], on_step=outage, max_steps=1)
        for name in names:
            served.faults[name].clear()
        assert pull(config, [loader.address]).steps == undisturbed[0].steps
        assert pulled.skipped == []


def test_an_outage_without_end_ends_the_run_with_its_url(tmp_path: Path, model: Path, served: HttpFiles) -> None:
    config = remote_config(
        tmp_path, model, served.url_of("demos.jsonl"), remote={"min_free_gb": 0, "deadline_s": COLD_S}
    )
    for i in range(20):
        served.faults[f"traj_{i}/obs.npz"] = ["503"] * 10_000
    log = tmp_path / "log"
    said = re.compile(r"WARNING http://.*obs\.npz: HTTP status 503 .* \(\d+ attempts in 3 s\)")
    with serving(config, log=log) as loader:
        with pytest.raises(DeadlineError, match=r"no data for 1 s"):
            pull(config, [loader.address], "trainer.feed.data_deadline_s=1")
        wait_until(lambda: said.search(log.read_text()), 60, "the warning with the URL")


def test_a_missing_file_ends_the_run_or_is_skipped_as_it_is_here(
    tmp_path: Path, model: Path, served: HttpFiles, undisturbed: tuple[Pulled, str]
) -> None:
    served.faults["traj_3/obs.npz"] = ["404"] * 1000
    url = served.url_of("demos.jsonl")
    config = remote_config(tmp_path / "fail", model, url)
    with serving(config) as loader, pytest.raises(StokerError, match=r"traj_3/obs\.npz: .*there is no such file"):
        pull(config, [loader.address])
    config = remote_config(tmp_path / "skip", model, url, on_bad_sample="skip")
    with serving(config) as loader:
        pulled = pull(config, [loader.address])
    assert len(pulled.skipped) == 7  # its timesteps
    assert all("traj_3/obs.npz" in reason for reason in pulled.skipped)


def test_a_bad_file_that_was_mended_is_fetched_again(tmp_path: Path, model: Path) -> None:
    """However new the copy is; until then the error names the original, which is what can be mended."""
    npz = write_demonstrations(tmp_path / "demos", [4] * 6).parent / "traj_3" / "obs.npz"
    whole = npz.read_bytes()
    npz.write_bytes(whole[:-40])
    with http_files(tmp_path / "demos") as served:
        config = remote_config(tmp_path / "run", model, served.url_of("demos.jsonl"))
        with serving(config) as loader:
            for _ in range(2):
                with pytest.raises(
                    DataError, match=rf"^{served.url_of('traj_3/obs.npz')}: record http://.*demos.jsonl:4"
                ):
                    pull(config, [loader.address])
            assert served.gets["traj_3/obs.npz"] == 1  # the same one: only asked for
            npz.write_bytes(whole)
            assert len(pull(config, [loader.address]).keys) == 24
    assert served.gets["traj_3/obs.npz"] == 2


@pytest.mark.slow
def test_dialogues_with_images_in_a_compressed_file(tmp_path: Path, model: Path) -> None:
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    rows = []
    for i in range(24):
        pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(data / "images" / f"{i} a.png")
        said = [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]
        rows.append(json.dumps({"messages": said, "images": [f"images/{i} a.png"]}))
    (data / "chats.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode(), mtime=0))
    local = write_config(tmp_path, model, [data / "chats.jsonl.gz"], dataset_type="chat")
    with serving(local) as loader:
        expected = pull(local, [loader.address])
    with http_files(data) as served:
        config = remote_config(tmp_path / "remote", model, served.url_of("chats.jsonl.gz"), dataset_type="chat")
        with serving(config, "--set", "loader.workers=2") as loader:
            assert pull(config, [loader.address]).steps == expected.steps
        assert set(served.gets.values()) == {1}
        assert len(served.gets) == 25
        checked = run_cli("serve", "--check", "--config", str(config))
        assert (checked.returncode, "check passed" in checked.stdout) == (0, True)
        assert set(served.gets.values()) == {1}


def test_a_folder_behind_a_url_and_shards_by_url(
    tmp_path: Path, model: Path, demos: Path, undisturbed: tuple[Pulled, str]
) -> None:
    config = remote_config(tmp_path, model, f"file://{demos.parent}")
    with serving(config, "--shards", f"file://{demos.parent}/*.jsonl") as loader:
        assert pull(config, [loader.address]).steps == undisturbed[0].steps
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    result = run_cli("prepare", "--config", str(config), "--verify", "--cache-dir", str(tmp_path / "elsewhere"))
    assert result.returncode == 0, result.stderr
    assert "verified: every record was read" in result.stdout
    tree = yaml.safe_load(config.read_text())
    tree["data"]["train_data_paths"] = ["s9://bucket/demos"]
    config.write_text(yaml.safe_dump(tree))
    result = run_cli("prepare", "--config", str(config))
    assert result.returncode == 1
    assert "data.train_data_paths[0]: s9:// in the data paths: fsspec knows no such protocol" in result.stderr


@pytest.mark.parametrize("version", [pytest.param("v2.1", marks=pytest.mark.slow), "v3.0"])
def test_lerobot_over_http(tmp_path: Path, model: Path, version: str) -> None:
    """HTTP has no folders: the files are found by the names in meta/, and those of other cameras are never asked for."""
    pytest.importorskip("av", reason="NOT TESTED: LeRobot data sets need av; pip install 'stoker[lerobot]'")
    lengths = (4, 9, 1, 12, 6, 5, 3)
    cameras = ["observation.images.front", "observation.images.wrist"]
    root = write_lerobot(tmp_path / "sets" / "one", lengths, version=version, videos=cameras)
    data = {"dataset_type": "lerobot", "options": {"image_keys": cameras[:1], "episodes": "0-5"}}
    local = write_config(tmp_path, model, [root], **data)
    with serving(local) as loader:
        expected, ready = pull(local, [loader.address]), loader.ready_line.split("|", 1)[1]
    with http_files(tmp_path / "sets") as served:
        remote = {"min_free_gb": 0, "cache_gb": 1e-6}
        config = remote_config(tmp_path / "remote", model, served.url_of("one"), **data, remote=remote)
        with serving(config) as loader:
            assert loader.ready_line.split("|", 1)[1] == ready
            assert pull(config, [loader.address]).steps == expected.steps
        assert not any("wrist" in name for name in served.gets)
    both = write_lerobot(tmp_path / "sets" / "two", lengths[:3], version=version, videos=cameras)
    local = write_config(tmp_path, model, [both.parent], **{**data, "options": {"image_keys": cameras[:1]}})
    config = remote_config(
        tmp_path / "folder", model, f"file://{both.parent}", dataset_type="lerobot", options={"image_keys": cameras[:1]}
    )
    with serving(local) as here, serving(config) as there:
        assert here.ready_line.split("|", 1)[1] == there.ready_line.split("|", 1)[1]
        assert pull(local, [here.address]).steps == pull(config, [there.address]).steps
