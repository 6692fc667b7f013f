"""`loader-bench` against fake loaders: its figures, its digests, its errors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from stoker_proto.host.ports import free_port
from stoker_proto.order.lanes import Order
from stoker_proto.wire.digests import digests_of_samples
from stoker_proto.wire.messages import Ticket
from tests.trainer.feed.fake_loader import CELL, LANES, LENGTHS, FakeLoader, StandInDecoder, make_piece
from trainer.bench import command as bench
from trainer.feed import feed

KEYS = {
    "samples", "samples_per_s", "loader_cpu_ms_per_sample", "client_cpu_ms_per_sample", "wire_bytes_per_sample",
    "records_decoded_per_record", "first_batch_s", "data_wait_frac", "digest",
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(feed, "_processor_of", lambda config, text: StandInDecoder())
    monkeypatch.setattr(feed, "_config_pins", lambda config: {})
    tree = {
        "model": {"base_model_path": "none"},
        "data": {
            "dataset_type": "mani_openpi",
            "train_data_paths": ["first.jsonl", "second.jsonl"],
            "max_seq_len": 64,
            "order": {"lanes": LANES, "cell": CELL},
        },
        "trainer": {"micro_batch_size": 4, "global_batch_size": 8, "lr": 1e-3, "feed": {"connect_deadline_s": 5}},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def run(config: str, capsys: pytest.CaptureFixture[str], *arguments: str, loaders: int = 1) -> dict[str, Any]:
    """Of two loaders each holds one entry: both are needed."""
    held = [(0, 1)] if loaders == 1 else [(0,), (1,)]
    with FakeLoader(name="a", held=held[0]) as a, FakeLoader(name="b", held=held[-1]) as b:
        connect = [word for loader in [a, b][:loaders] for word in ("--connect", loader.address)]
        bench.main(["--config", config, *connect, "--json", *arguments])
    out = capsys.readouterr().out
    assert "samples/s" in out
    figures: dict[str, Any] = json.loads(out.splitlines()[-1])
    return figures


def expected_stream_digest(start: int, stop: int) -> str:
    digest = hashlib.sha256()
    for run_ in Order(LENGTHS[0] + LENGTHS[1], CELL).runs(start, stop):
        ticket = Ticket(ticket=0, split="train", epoch=0, lane=run_.lane, start=run_.start, count=run_.count)
        digest.update(b"".join(digests_of_samples(make_piece(ticket, "x"))))
    return digest.hexdigest()


def test_a_whole_epoch(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    figures = run(config, capsys)
    assert set(figures) >= KEYS
    assert (figures["samples"], figures["steps"], figures["records"]) == (60, 8, 7)
    assert figures["records_decoded_per_record"] == pytest.approx(60 / 7)  # the fake loader counts samples
    assert figures["stream_digest"] == expected_stream_digest(0, 60)
    assert 0 < figures["first_batch_s"] < 60
    assert 0 <= figures["data_wait_frac"] <= 1
    assert figures["tickets"] >= 15
    assert figures["hedges"] == figures["duplicates"] == figures["takeovers"] == 0
    assert 0 < figures["longest_gap_s"] < 60
    assert figures["wire_bytes_per_sample"] > 20


def test_digest_does_not_depend_on_loaders(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = run(config, capsys), run(config, capsys, loaders=2)
    assert one["digest"] == two["digest"]
    assert two["loaders"] == 2
    assert run(config, capsys, "--epoch", "1")["digest"] != one["digest"]


def test_ranks_share_the_same_stream(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = run(config, capsys), run(config, capsys, "--ranks", "2", loaders=2)
    small = run(config, capsys, "--ranks", "2", "--set", "trainer.micro_batch_size=1")
    assert one["stream_digest"] == two["stream_digest"] == small["stream_digest"]
    assert one["digest"] != two["digest"]
    assert two["samples"] == 60


def test_a_part_of_an_epoch(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    figures = run(config, capsys, "--start-sample", "16", "--batches", "2", "--step-time-ms", "1")
    assert (figures["samples"], figures["steps"]) == (16, 2)
    assert figures["stream_digest"] == expected_stream_digest(16, 32)


def test_the_help_says_where_it_connects(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse_arguments(["--help"])
    assert "repeatable; default: cluster.loader_addresses" in " ".join(capsys.readouterr().out.split())


def test_nobody_there_is_one_line(config: str) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    with pytest.raises(SystemExit) as caught:
        bench.main(["--config", config, "--connect", address, "--set", "trainer.feed.connect_deadline_s=0.2"])
    assert str(caught.value).startswith(
        "loader-bench: no loaders that together hold all the data answered within 0.2 s"
    )
    assert address in str(caught.value)


def test_impossible_ranks_are_one_line(config: str) -> None:
    with pytest.raises(SystemExit, match=r"loader-bench: trainer\.global_batch_size is 8"):
        bench.main(["--config", config, "--ranks", "3"])


@pytest.mark.parametrize(
    ("flag", "value", "rule"),
    [
        ("--ranks", "0", "it must be 1 or more"),
        ("--decode-threads", "0", "it must be 1 or more"),
        ("--batches", "0", "it must be 1 or more"),
        ("--start-sample", "-8", "it must be 0 or more"),
        ("--start-sample", "60", "epoch 0 has 60 samples, counted from 0"),
        ("--epoch", "-1", "it must be 0 or more"),
        ("--step-time-ms", "-1.0", "it must be 0 or more"),
        ("--step-time-ms", "nan", "it must be 0 or more"),
    ],
)
def test_a_flag_out_of_range_is_named(config: str, flag: str, value: str, rule: str) -> None:
    with FakeLoader() as loader, pytest.raises(SystemExit) as caught:
        bench.main(["--config", config, "--connect", loader.address, flag, value])
    assert str(caught.value) == f"loader-bench: {flag} is {value}: {rule}"


def test_an_error_of_one_rank_ends_all(config: str) -> None:
    with FakeLoader() as loader:
        loader.data_error_at = (1, 4)
        with pytest.raises(SystemExit, match=r"loader-bench: obs\.npz: record 4: truncated"):
            bench.main(["--config", config, "--connect", loader.address, "--ranks", "2"])
