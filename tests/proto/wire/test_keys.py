"""Key files: who may read them, what is refused and in which words; and the rules of `cluster.security`."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from stoker_proto.config.reader import load_config
from stoker_proto.errors import ConfigError
from stoker_proto.wire.keys import read_allowed, read_public, read_secret, write_pair

PUBLIC, SECRET = b"Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID", b"D:)Q[IlAW!ahhC2ac:9*A}h:p?([4%wOTJ%JR%cs"
"""The pair of the example in ZeroMQ's own documentation."""


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_pair(tmp_path / "keys", "rank-0", PUBLIC, SECRET)


def test_a_pair_is_read_back_and_only_its_owner_may_read_the_secret(pair: tuple[Path, Path]) -> None:
    public, secret = pair
    assert (public.name, secret.name) == ("rank-0.key", "rank-0.key_secret")
    assert (read_public(public).name, read_public(public).value) == ("rank-0", PUBLIC)
    assert read_secret(secret).value == SECRET
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert stat.S_IMODE(secret.parent.stat().st_mode) == 0o700


def test_a_key_file_is_one_line_of_json(pair: tuple[Path, Path]) -> None:
    start = '{"format": "stoker-curve-1", "name": "rank-0", '
    assert pair[0].read_text() == start + f'"public": "{PUBLIC.decode()}"}}\n'
    assert pair[1].read_text() == start + f'"secret": "{SECRET.decode()}"}}\n'


def test_a_key_does_not_show_itself(pair: tuple[Path, Path]) -> None:
    assert repr(read_secret(pair[1])) == "Key('rank-0')"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o660])
def test_a_secret_that_others_can_read_or_change_is_refused(pair: tuple[Path, Path], mode: int) -> None:
    pair[1].chmod(mode)
    with pytest.raises(ConfigError) as caught:
        read_secret(pair[1])
    assert str(caught.value).startswith(f"{pair[1]} has mode {mode:04o}: ")
    assert f"chmod 600 {pair[1]}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_credential_of_the_service_manager_may_carry_an_access_list(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(pair[1].parent))
    pair[1].chmod(0o440)
    assert read_secret(pair[1]).value == SECRET
    pair[1].chmod(0o444)
    with pytest.raises(ConfigError, match="0444"):
        read_secret(pair[1])


@pytest.mark.parametrize("left", [0, 1])
def test_nothing_is_overwritten(pair: tuple[Path, Path], left: int) -> None:
    before = pair[left].read_bytes()
    pair[1 - left].unlink()
    with pytest.raises(ConfigError, match="is there already, and keys are never overwritten"):
        write_pair(pair[0].parent, "rank-0", SECRET, PUBLIC)
    assert pair[left].read_bytes() == before
    assert not pair[1 - left].exists()


def test_a_folder_that_others_can_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match=r"has mode 0777.*chmod 700"):
        write_pair(tmp_path, "loader", PUBLIC, SECRET)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "../loader", "a b", ".hidden", "x" * 65])
def test_a_name_that_is_no_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="--name"):
        write_pair(tmp_path / "keys", name, PUBLIC, SECRET)
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is no key file"),
        ("[" * 4000, "is no key file"),
        ('{"format": "stoker-curve-2"}', "is no key file of format stoker-curve-1"),
        ('{"format": "stoker-curve-1", "name": "a", "secret": "x"}', "holds no public key"),
        ('{"format": "stoker-curve-1", "name": "a", "public": "short"}', "is damaged"),
        ('{"format": "stoker-curve-1", "name": "a", "public": 7}', "is damaged"),
        ('{"format": "stoker-curve-1", "name": "a\\nb", "public": "' + PUBLIC.decode() + '"}', "is damaged"),
    ],
)
def test_what_is_no_key_is_said(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "a.key"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_public(path)
    assert str(caught.value).startswith(str(path))
    assert words in str(caught.value)


def test_the_wrong_half_is_said(pair: tuple[Path, Path]) -> None:
    pair[0].chmod(0o600)
    with pytest.raises(ConfigError, match=r"holds no secret key .* ends in \.key_secret"):
        read_secret(pair[0])


def test_a_list_of_files_and_folders(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    other, _ = write_pair(tmp_path / "others", "b", SECRET, PUBLIC)
    assert read_allowed([str(pair[0].parent), str(other)]) == {PUBLIC: "rank-0", SECRET: "b"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty holds no \*\.key file"):
        read_allowed([str(tmp_path / "empty")])
    with pytest.raises(ConfigError, match=r"none\.key: the key file cannot be read"):
        read_allowed([str(tmp_path / "none.key")])


MINIMAL = """
model: {base_model_path: m}
data: {dataset_type: mani_openpi, train_data_paths: [t.jsonl], max_seq_len: 64}
trainer: {micro_batch_size: 4, global_batch_size: 24, lr: 1e-3}
cluster: {security: %s}
"""


@pytest.mark.parametrize(
    ("security", "words"),
    [
        ("{loader_secret: a}", "a loader needs its secret key and the public keys of the ranks it admits, or neither"),
        ("{allowed_ranks: [a]}", "loader_secret is None and allowed_ranks is ['a']"),
        ("{loader_key: a}", "rank_secret is None: a rank needs the loaders' public key and a secret key of its own"),
        ("{rank_secret: a}", "cluster.security.loader_key is None"),
        (
            "{loader_secret: a, allowed_ranks: b, loader_key: c, rank_secret: a}",
            "could pass for a loader; make a second pair",
        ),
        ("{loader_secrets: a}", "did you mean cluster.security.loader_secret?"),
    ],
)
def test_half_of_a_side_is_refused(tmp_path: Path, security: str, words: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL % security)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "security",
    ["{}", "{loader_secret: a, allowed_ranks: b}", "{loader_key: c, rank_secret: d}"],
)
def test_each_side_may_stand_alone(tmp_path: Path, security: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL % security)
    assert load_config(path)
