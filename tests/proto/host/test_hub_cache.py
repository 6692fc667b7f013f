"""A hub id is looked up where `hf download` puts models, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from stoker_proto.errors import ConfigError
from stoker_proto.host.hub_cache import explain_missing, find_model_folder, hub_cache, hub_id_of, is_hub_id
from stoker_proto.model_folder import ModelFolder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def download(cache: Path, ref: str = COMMIT) -> Path:
    folder = cache / "models--owner--a-model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(ref)
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    return folder / "snapshots" / COMMIT


def test_the_downloaded_snapshot_is_the_model(cache: Path) -> None:
    snapshot = download(cache)
    assert find_model_folder("owner/a-model") == snapshot
    (snapshot / "config.json").write_text('{"model_type": "llama"}')
    assert ModelFolder("owner/a-model").config == {"model_type": "llama"}


def test_a_folder_wins_over_a_hub_id(cache: Path) -> None:
    download(cache)
    assert hub_id_of("owner/a-model") == "owner/a-model"
    Path("owner/a-model").mkdir(parents=True)
    assert find_model_folder("owner/a-model") == Path("owner/a-model")
    assert hub_id_of("owner/a-model") is None


@pytest.mark.parametrize("ref", ["../../../etc", "", "main", "f" * 40])
def test_a_ref_that_names_no_snapshot_is_no_model(cache: Path, ref: str) -> None:
    download(cache, ref)
    assert find_model_folder("owner/a-model") == Path("owner/a-model")


def test_a_model_that_was_not_downloaded_is_an_error_with_the_command(cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.base_model_path is 'owner/a-model': no such folder; .*is not in "
                                          rf"{cache} either: download it .* with `hf download owner/a-model`"):  # fmt: skip
        ModelFolder("owner/a-model")


@pytest.mark.parametrize("name", ["/models/a", "models", "a/b/c", "../b", "./b", "a--b/c", "a/b "])
def test_a_path_is_no_hub_id(name: str) -> None:
    assert not is_hub_id(name)
    assert explain_missing(name) == "name the folder of a downloaded model (config.json, weights, tokenizer.json)"


def test_the_cache_is_where_the_hubs_own_tools_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/her")
    assert hub_cache() == Path("/home/her/.cache/huggingface/hub")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/x")
    assert hub_cache() == Path("/var/cache/x/huggingface/hub")
    monkeypatch.setenv("HF_HOME", "/srv/hf")
    assert hub_cache() == Path("/srv/hf/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "/srv/models")
    assert hub_cache() == Path("/srv/models")
