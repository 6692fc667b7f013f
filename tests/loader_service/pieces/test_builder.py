"""Tickets in, frames out: small records are encoded together, and nobody can tell from the pieces."""

from __future__ import annotations

import errno
import json
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from loader_service.manifest import EntryManifest
from loader_service.pieces import builder as builder_module
from loader_service.pieces.builder import PieceBuilder
from loader_service.pieces.encoder import RecordEncoder
from loader_service.pieces.piece import EncodedRecord, Outcome, check_sample
from loader_service.plan.lane_plan import PlanKey
from loader_service.plan.plan_files import make_plan
from loader_service.prepare.run import prepare
from loader_service.sources import npz
from stoker_proto.config import Config
from stoker_proto.config.reader import load_config
from stoker_proto.errors import DataError
from stoker_proto.processor import Processor
from stoker_proto.wire import encoding
from stoker_proto.wire.messages import Failure, Message, Piece, Ticket
from tests.end_to_end.fleet import write_config, write_demonstrations
from tests.tiny_models import make_config, write_model_folder

NUM = 200


class Watched(RecordEncoder):
    """Remembers how many records it was asked for at once."""

    turns: list[list[int]]

    def encode_all(self, places: Sequence[tuple[EntryManifest, int]], epoch: int) -> list[Outcome]:
        self.turns.append([record for _, record in places])
        return super().encode_all(places, epoch)


def chats(folder: Path, *, bad: range = range(0), image: bool = False, words: int = 6, num: int = NUM) -> Path:
    shard = folder / "chats.jsonl"
    with shard.open("w") as lines:
        for number in range(num):
            roles = ("user", "assistant") if number not in bad else ("user", "nobody")
            messages = [{"role": role, "content": f"{role} {number} " + "word " * words} for role in roles]
            lines.write(json.dumps({"messages": messages, **({"images": ["a.png"]} if image else {})}) + "\n")
    if image:
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(folder / "a.png")
    return shard


def chat_config(folder: Path, shard: Path, *, family: str = "causal", max_seq_len: int = 512) -> Config:
    (folder / "model").mkdir(exist_ok=True)
    model = write_model_folder(folder / "model", family)
    return make_config(
        model, "data.dataset_type=chat", f"data.train_data_paths=[{shard}]", "data.order.lanes=4",
        max_seq_len=max_seq_len,
    )  # fmt: skip


def robot_config(folder: Path) -> Config:
    (folder / "model").mkdir()
    model = write_model_folder(folder / "model")
    demos = write_demonstrations(folder / "demos", [3] * 20)
    return make_config(model, "data.dataset_type=mani_openpi", f"data.train_data_paths=[{demos}]")


@contextmanager
def building(
    config: Config, *, threads: int = 1, read_ahead: bool = False
) -> Iterator[tuple[PieceBuilder, Watched, EntryManifest, queue.Queue[Message]]]:
    prepared = prepare(config)
    encoder = Watched(config.data, Processor.build(config, prepared.codec, prepared.states))
    encoder.turns = []
    answers: queue.Queue[Message] = queue.Queue()
    builder = PieceBuilder(
        encoder, "one", lambda _, frame: answers.put(encoding.decode(frame)), threads=threads, cache_bytes=1 << 26,
        read_ahead=read_ahead,
    )  # fmt: skip
    try:
        yield builder, encoder, prepared.entries["train"][0], answers
    finally:
        assert builder.close(60)


def whole_epoch(config: Config, **options: bool | int) -> tuple[dict[int, Message], list[list[int]]]:
    """The answers to tickets of 5 rows over all lanes, and which records were encoded together."""
    with building(config, **options) as (builder, encoder, manifest, answers):
        plan = make_plan(manifest, config.data, PlanKey("train", 0, 0))
        number = 0
        for lane, length in enumerate(plan.lane_lengths()):
            for start in range(0, length, 5):
                ticket = Ticket(
                    ticket=number, split="train", epoch=0, lane=lane, start=start, count=min(5, length - start)
                )
                builder.submit(b"rank", ticket, manifest, plan, lane, lambda: None)
                number += 1
        found: dict[int, Message] = {}
        for _ in range(number):
            answer = answers.get(timeout=60)
            assert isinstance(answer, (Piece, Failure))
            assert answer.ticket not in found
            found[answer.ticket] = answer
        return found, encoder.turns


@pytest.mark.long
def test_small_records_are_encoded_together_and_each_once(tmp_path: Path) -> None:
    config = chat_config(tmp_path, chats(tmp_path))
    alone, _ = whole_epoch(config)
    for threads, read_ahead in ((1, True), (3, False), (3, True)):
        together, turns = whole_epoch(config, threads=threads, read_ahead=read_ahead)
        assert {n: encoding.encode(answer) for n, answer in together.items()} == {
            n: encoding.encode(answer) for n, answer in alone.items()
        }
        assert sorted(record for turn in turns for record in turn) == list(range(NUM))
        assert 1 < max(map(len, turns)) <= 128


@pytest.mark.long
def test_large_ones_are_not_kept_waiting_for_each_other(tmp_path: Path) -> None:
    shard = chats(tmp_path, words=8000, num=30)  # 80 KB each
    _, turns = whole_epoch(chat_config(tmp_path, shard, max_seq_len=1 << 16))
    assert max(map(len, turns)) == 7  # more than 512 KiB


def test_a_bad_record_is_the_failure_of_its_ticket_only(tmp_path: Path) -> None:
    answers, turns = whole_epoch(chat_config(tmp_path, chats(tmp_path, bad=range(37, 38))))
    failures = [answer for answer in answers.values() if isinstance(answer, Failure)]
    assert [failure.reason for failure in failures] == ["data"]
    assert "role 'nobody'" in failures[0].message
    assert len(next(turn for turn in turns if 37 in turn)) > 1


def test_a_ticket_with_many_bad_records_fails_once(tmp_path: Path) -> None:
    answers, _ = whole_epoch(chat_config(tmp_path, chats(tmp_path, bad=range(NUM))))
    assert all(isinstance(answer, Failure) for answer in answers.values())


@pytest.mark.parametrize("kind", ["robot", "images"])
def test_records_with_frames_come_one_by_one_so_that_threads_share_them(kind: str, tmp_path: Path) -> None:
    config = (
        robot_config(tmp_path)
        if kind == "robot"
        else chat_config(tmp_path, chats(tmp_path, image=True), family="llava")
    )
    _, turns = whole_epoch(config)
    first = turns[0] if kind == "images" else []  # who could know before one was read
    assert all(len(turn) == 1 for turn in turns if turn is not first)


def test_what_no_library_takes_is_one_bad_record_and_the_loader_lives_on(tmp_path: Path) -> None:
    """Half a surrogate pair, which orjson refuses and a class of one's own may give: not a failure of the whole turn."""
    shard = tmp_path / "a.jsonl"
    texts = ["fine"] * 40
    texts[17] = "half \ud800 a character"
    turns = [[["user", text, False], ["assistant", "Hello", True]] for text in texts]
    shard.write_text("".join(json.dumps([{"turns": one}]) + "\n" for one in turns))
    config = chat_config(tmp_path, shard)
    kind = "tests.loader_service.dataset_classes:Dialogues"
    answers, turns_taken = whole_epoch(replace(config, data=replace(config.data, dataset_type=kind)))
    failures = [answer for answer in answers.values() if isinstance(answer, Failure)]
    assert [failure.reason for failure in failures] == ["data"]
    assert "a.jsonl: record 17, field sample 0: it cannot be written as rows" in failures[0].message
    assert len(next(turn for turn in turns_taken if 17 in turn)) > 1
    assert len(answers) == 8


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (
            "uneven",
            "record 0, field action: action 1 of the record has shape [1, 3], the first one [1, 7]: all need the same",
        ),
        ("nan", "record 0, field action: row 1, timestep 0: dimension 2 is nan; an action needs finite numbers"),
        ("text", "record 0, field sample 1: `Sample.action` cannot be read as numbers"),
        ("flat", "record 0, field sample 1: `Sample.action` has shape [7]: 2 dimensions are expected"),
        ("words", "record 0, field sample 1: `Sample.instruction` is a bytes: a str is expected"),
        ("frames", "record 0, field sample 1: `Sample.images` has a list: NumPy arrays are expected"),
        ("dict", "record 0, field sample 1: `read` gave a dict: each item must be a Sample"),
        ("raises", "record 0: ZeroDivisionError: integer"),
    ],
)
def test_what_a_class_returns_wrongly_is_one_bad_record_with_its_place(kind: str, reason: str, tmp_path: Path) -> None:
    config = robot_config(tmp_path)
    prepared = prepare(config)
    data = replace(config.data, dataset_type="tests.loader_service.dataset_classes:Wrong", options={"wrong": kind})
    encoder = RecordEncoder(data, Processor.build(config, prepared.codec))
    manifest = prepared.entries["train"][0]
    outcomes = encoder.encode_all([(manifest, number) for number in range(3)], 0)
    assert [type(outcome) for outcome in outcomes] == [DataError, EncodedRecord, EncodedRecord]
    assert str(outcomes[0]).startswith(f"{data.train_data_paths[0]}: {reason}")


@pytest.mark.parametrize("name", ["encode_image", "encode_actions", "codec"])
def test_a_bug_of_ours_is_no_bad_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `skip` it would cost samples in silence. Raised, it ends the worker, whose tickets get FAILURE `died`."""
    config = robot_config(tmp_path)
    config = replace(config, data=replace(config.data, on_bad_sample="skip"))
    prepared = prepare(config)
    processor = Processor.build(config, prepared.codec)
    owner = processor.codec if name == "codec" else processor
    monkeypatch.setattr(owner, "encode" if name == "codec" else name, raising(ZeroDivisionError("a bug")))
    encoder = RecordEncoder(config.data, processor)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        encoder.encode_all([(prepared.entries["train"][0], 0)], 0)


@pytest.mark.long
@pytest.mark.parametrize("policy", ["fail", "skip"])
@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("images", "it has 256 images: at most 255 travel in a sample"),
        ("timestep", "its timestep is 9223372036854775808: a whole number from 0 to 9223372036854775807 is expected"),
        ("fraction", "its timestep is 0.5: a whole number from 0 to 9223372036854775807 is expected"),
        ("action", "its action has shape [1, 4097]: at most 4096 a side travel"),
    ],
)
def test_a_sample_that_no_piece_can_hold_is_a_bad_one_and_the_loader_lives_on(
    what: str, reason: str, policy: str, tmp_path: Path
) -> None:
    config = robot_config(tmp_path)
    kind = "tests.loader_service.dataset_classes:TooLarge"
    data = replace(config.data, dataset_type=kind, options={"too_large": what}, on_bad_sample=policy)
    answers, _ = whole_epoch(replace(config, data=data))
    message = f"{data.train_data_paths[0]}: record 0, field sample 1: {reason}"
    failures = [answer for answer in answers.values() if isinstance(answer, Failure)]
    skipped = [text for answer in answers.values() if isinstance(answer, Piece) for text in answer.skipped.values()]
    if policy == "fail":
        assert {failure.reason for failure in failures} == {"data"}
        assert all(failure.message.startswith(message) for failure in failures)
    else:
        assert not failures
        assert len(skipped) == 3  # the samples of the record
        assert all(text.startswith(message) for text in skipped)


def test_images_that_fill_more_than_a_message_are_a_bad_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "MAX_FRAME_BYTES", 1 << 20)
    check_sample([b"x" * 100_000] * 9, 0)
    with pytest.raises(DataError, match=r"its 10 images have 1000000 bytes: at most 1048576 travel in a message"):
        check_sample([b"x" * 100_000] * 10, 0)


def test_trouble_of_the_host_is_unavailable_and_the_next_ticket_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In reading, over a whole turn, and in putting a piece together."""
    config = robot_config(tmp_path)
    config = replace(config, data=replace(config.data, on_bad_sample="skip"))
    ticket = Ticket(ticket=0, split="train", epoch=0, lane=0, start=0, count=2)
    with building(config) as (builder, encoder, manifest, answers):
        plan = make_plan(manifest, config.data, PlanKey("train", 0, 0))

        def ask() -> Message:
            builder.submit(b"rank", ticket, manifest, plan, 0, lambda: None)
            return answers.get(timeout=30)

        for owner, name, error in (
            (npz.os, "pread", OSError(errno.EIO, os.strerror(errno.EIO))),
            (npz.os, "pread", MemoryError()),
            (encoder, "encode_all", OSError(errno.EMFILE, os.strerror(errno.EMFILE))),
            (builder_module, "assemble_piece", MemoryError()),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, raising(error))
                answer = ask()
            assert isinstance(answer, Failure), name
            assert answer.reason == "unavailable", name
            assert "trouble of this host" in answer.message
        piece = ask()
        assert isinstance(piece, Piece)
        assert piece.skipped == {}
        assert piece.supervised.any()


def raising(error: Exception) -> Callable[..., None]:
    def call(*_: object, **__: object) -> None:
        raise error

    return call


def test_a_read_that_hangs_does_not_keep_the_builder_open(tmp_path: Path) -> None:
    """A file system that does not answer: the process must still end after SIGTERM."""
    released, began = threading.Event(), threading.Event()

    class Hanging(RecordEncoder):
        def encode_all(self, places: Any, epoch: int) -> Any:
            began.set()
            assert released.wait(60)
            return super().encode_all(places, epoch)

    (tmp_path / "model").mkdir()
    demos = write_demonstrations(tmp_path / "demos", [4] * 3)
    config = load_config(write_config(tmp_path, write_model_folder(tmp_path / "model"), [demos]), [])
    prepared = prepare(config)
    manifest = prepared.entries["train"][0]
    encoder = Hanging(config.data, Processor.build(config, prepared.codec))
    builder = PieceBuilder(encoder, "one", lambda *_: None, threads=1, cache_bytes=1 << 26, read_ahead=False)
    plan = make_plan(manifest, config.data, PlanKey("train", 0, 0))
    builder.submit(
        b"rank", Ticket(ticket=1, split="train", epoch=0, lane=0, start=0, count=1), manifest, plan, 0, lambda: None
    )
    assert began.wait(60)
    assert not builder.close(0.1)
    released.set()
    assert builder.close(60)
