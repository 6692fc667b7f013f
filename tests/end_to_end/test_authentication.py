"""CURVE on real processes: right keys change nothing, wrong ones get nothing, and both sides say so."""

from __future__ import annotations

import random
import socket
import stat
from pathlib import Path

import pytest
import zmq

from stoker_proto.config.reader import load_config
from stoker_proto.errors import ConfigError, DeadlineError, RefusedError
from tests.end_to_end.conftest import LENGTHS
from tests.end_to_end.fleet import Loader, Pulled, pull, run_cli, serving, wait_until
from trainer.feed.feed import Feed


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """Pairs of a loader, a rank and a stranger, made by the command."""
    folder = tmp_path / "keys"
    for name in ("loader", "rank", "stranger"):
        done = run_cli("keys", "--out", str(folder), "--name", name)
        assert done.returncode == 0, done.stderr
        assert str(folder / f"{name}.key_secret") in done.stdout
    return folder


def loader_side(keys: Path, *allowed: str) -> list[str]:
    """Arguments of a loader that admits these."""
    files = ",".join(str(keys / f"{name}.key") for name in allowed)
    values = f"loader_secret={keys}/loader.key_secret", f"allowed_ranks=[{files}]"
    return [word for value in values for word in ("--set", f"cluster.security.{value}")]


def rank_side(keys: Path, name: str = "rank", loader: str = "loader") -> list[str]:
    """Overrides of a rank that bears this name and believes in this loader."""
    values = f"loader_key={keys}/{loader}.key", f"rank_secret={keys}/{name}.key_secret"
    return [f"cluster.security.{value}" for value in values]


def pull_all(config: Path, loader: Loader, *overrides: str) -> Pulled:
    """An epoch, with deadlines short enough for a test."""
    return pull(config, [loader.address], "trainer.feed.connect_deadline_s=20", *overrides)


def refusal(config: Path, loader: Loader, *overrides: str, reason: str, otherwise: str) -> None:
    """Nothing is pulled, and the error has the `reason`. libzmq knows it only where the rank reads the loader's greeting before
    its hang-up, which a rank on a busy machine may miss at each of six tries: then each error has the words `otherwise`."""
    for _ in range(6):
        with pytest.raises((RefusedError, DeadlineError)) as caught:
            pull_all(config, loader, *overrides)
        if isinstance(caught.value, RefusedError):
            assert reason in str(caught.value)
            return
        assert otherwise in str(caught.value)


def said(log: Path, *words: str) -> None:
    """Wait until one of these stands in the loader's log."""
    wait_until(lambda: any(word in log.read_text() for word in words), 60, f"{words} in {log.read_text()!r}")


def test_the_command_makes_files_for_their_owner_alone(keys: Path) -> None:
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    for name in ("loader", "rank", "stranger"):
        assert stat.S_IMODE((keys / f"{name}.key_secret").stat().st_mode) == 0o600
    done = run_cli("keys", "--out", str(keys), "--name", "rank")
    assert done.returncode == 1
    assert done.stderr.startswith(f"loader-keys: {keys}/rank.key is there already")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_right_keys_give_the_same_bytes_as_none(config: Path, keys: Path, workers: int) -> None:
    with serving(config) as loader:
        clear = pull_all(config, loader)
    with serving(config, *loader_side(keys, "rank"), "--set", f"loader.workers={workers}") as loader:
        encrypted = pull_all(config, loader, *rank_side(keys))
    assert len(clear.keys) == sum(LENGTHS)
    assert encrypted.keys == clear.keys
    assert encrypted.steps == clear.steps


def test_whoever_is_refused_is_told_why_and_the_loader_lives_on(config: Path, keys: Path, tmp_path: Path) -> None:
    log = tmp_path / "loader.log"
    with serving(config, *loader_side(keys, "rank"), "--log-level", "INFO", log=log) as loader:
        with pytest.raises(RefusedError, match="refused our key 'stranger'") as unknown:
            pull_all(config, loader, *rank_side(keys, "stranger"))
        said(log, "is not in cluster.security.allowed_ranks")
        assert "from 127.0.0.1: its public key" in log.read_text()

        with pytest.raises(
            (RefusedError, DeadlineError), match=r"it uses CURVE keys|does that loader use keys"
        ) as none:
            pull_all(config, loader)
        said(log, "it brought no key", "hung up in the handshake")

        other_key = [*rank_side(keys, loader="stranger"), "trainer.feed.connect_deadline_s=3"]
        for _ in range(6):  # on a busy machine a rank may give up before its handshake reached the loader
            with pytest.raises(DeadlineError, match="loader_key is not the public key of the loader there") as wrong:
                pull_all(config, loader, *other_key)
            if "it was made for another loader's public key" in log.read_text():
                break
        said(log, "it was made for another loader's public key")

        for error in (unknown.value, none.value, wrong.value):
            assert loader.address in str(error)
            assert "\n" not in str(error)
        assert len(pull_all(config, loader, *rank_side(keys)).keys) == sum(LENGTHS)
        assert loader.end() == 0


def test_a_rank_with_keys_does_not_talk_to_a_loader_without(config: Path, keys: Path) -> None:
    with serving(config) as loader:
        refusal(config, loader, *rank_side(keys), reason="does not use CURVE", otherwise="that loader uses no keys")
        assert len(pull_all(config, loader).keys) == sum(LENGTHS)


def test_a_stranger_gets_no_byte_of_an_answer(config: Path, keys: Path) -> None:
    with serving(config, *loader_side(keys, "rank")) as loader, zmq.Context() as context:
        peer = context.socket(zmq.DEALER)
        peer.setsockopt(zmq.LINGER, 0)
        peer.connect(loader.address)
        peer.send(b"H" + b"\x80")
        assert not peer.poll(1000)
        peer.close(0)


def test_bytes_that_are_no_handshake_change_nothing(config: Path, keys: Path) -> None:
    chance = random.Random(5)
    with serving(config, *loader_side(keys, "rank")) as loader:
        host, port = loader.address.removeprefix("tcp://").split(":")
        for _ in range(100):
            greeting = bytes([0xFF, *bytes(8), 0x7F, 3, 1]) + b"CURVE".ljust(20, b"\0") + bytes(32)
            with socket.create_connection((host, int(port)), 5) as peer:
                peer.sendall(greeting[: chance.randrange(len(greeting) + 1)] + chance.randbytes(chance.randrange(300)))
        assert len(pull_all(config, loader, *rank_side(keys)).keys) == sum(LENGTHS)


def test_a_loader_that_comes_back_with_other_keys_is_left_out_and_taken_back(
    config: Path, keys: Path, tmp_path: Path
) -> None:
    """In mid-run the other loader does the work; the address is dialled again until the keys fit."""
    log = tmp_path / "second.log"
    other = ["--set", f"cluster.security.loader_secret={keys}/loader.key_secret", "--set"]
    other.append(f"cluster.security.allowed_ranks={keys}/stranger.key")
    with serving(config, *loader_side(keys, "rank")) as first:
        with serving(config, *loader_side(keys, "rank")) as second:
            address = second.address
        stages: list[str] = []

        def on_step(step: int) -> None:
            if step == 1:
                with serving(config, *other, "--bind", address, log=log):
                    said(log, "is not in cluster.security.allowed_ranks")
                stages.append("refused")
            elif step == 3:
                with serving(config, *loader_side(keys, "rank"), "--bind", address, "--log-level", "INFO", log=log):
                    said(log, "admitted rank key rank from 127.0.0.1")
                stages.append("admitted")

        pulled = pull(config, [first.address, address], *rank_side(keys), on_step=on_step)
    assert stages == ["refused", "admitted"]
    assert len(pulled.keys) == len(set(pulled.keys)) == sum(LENGTHS)


def test_a_secret_that_others_can_read_is_refused_on_both_sides(config: Path, keys: Path) -> None:
    (keys / "loader.key_secret").chmod(0o644)
    done = run_cli("serve", "--config", str(config), "--check", *loader_side(keys, "rank"))
    assert done.returncode == 1
    assert done.stderr.startswith(f"loader-serve: {keys}/loader.key_secret has mode 0644")
    assert len(done.stderr.splitlines()) == 1
    (keys / "rank.key_secret").chmod(0o640)
    with pytest.raises(ConfigError, match=r"rank.key_secret has mode 0640.*chmod 600"):
        Feed(load_config(config, rank_side(keys)), "train", 0, 1)


def test_with_keys_a_loader_may_bind_beyond_loopback(config: Path, keys: Path) -> None:
    command = ["serve", "--config", str(config), "--check", "--bind", "tcp://0.0.0.0:5999"]
    assert run_cli(*command, *loader_side(keys, "rank")).returncode == 0
    refused = run_cli(*command, *[f"--set={value}" for value in rank_side(keys)])
    assert refused.returncode == 1
    assert "loader-keys" in refused.stderr
    assert "--insecure" in refused.stderr
