"""Text from the scan to the loader's samples: both count the same rows and tokens; states; what is said at the start."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loader_service.pieces.encoder import RecordEncoder
from loader_service.pieces.text_samples import Counting
from loader_service.prepare import command as cli
from loader_service.prepare import parts as parts_module
from loader_service.prepare import scan_pool
from loader_service.prepare.first_records import check_first_records
from loader_service.prepare.run import Prepared, ScanOptions, prepare
from loader_service.prepare.verify import verify
from loader_service.sources.base import make_datasets
from loader_service.sources.chat.repair import MERGED, TRAILING
from stoker_proto.config import Config
from stoker_proto.errors import ConfigError, DataError, RowError
from stoker_proto.processor import Processor
from stoker_proto.text.turns import Turn
from tests.loader_service.dataset_classes import Language
from tests.proto.text.chat_templates import CHATML, REASONING, plain
from tests.tiny_models import cached_in, make_config, write_model_folder

MODULE = "tests.loader_service.dataset_classes"
WORDS = ("push the cube", "x = 1\n", "</s>", "<|User|>", "机器人", "🤖", " ", "<action_7>", "a" * 30)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def write_model(folder: Path) -> Path:
    write_model_folder(folder, "causal")
    (folder / "chat_template.jinja").write_text(plain(CHATML))
    return folder


def random_lines(seed: int, count: int) -> list[list[dict[str, Any]]]:
    """Records of no sample up to three: texts of any length, also empty ones, ids, dialogues."""
    generator = random.Random(seed)

    def text(longest: int) -> str:
        return "".join(generator.choice(WORDS) for _ in range(generator.randint(0, longest)))

    def sample() -> dict[str, Any]:
        kind = generator.choice(("text", "text", "turns", "input_ids"))
        if kind == "turns":
            return {"turns": [["user", text(3), False], ["assistant", text(2), True], ["user", "?", False]]}
        if kind == "input_ids":
            return {"input_ids": [generator.randint(3, 1000) for _ in range(generator.randint(0, 90))]}
        return {"text": text(60)}

    return [[sample() for _ in range(generator.randint(0, 3))] for _ in range(count)]


def write(path: Path, lines: list[list[dict[str, Any]]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config_of(model: Path, shard: Path, *overrides: str, kind: str = "Language", max_seq_len: int = 64) -> Config:
    paths = f"data.train_data_paths=[{shard}]"
    return make_config(model, f"data.dataset_type={MODULE}:{kind}", paths, *overrides, max_seq_len=max_seq_len)


def encode_all(config: Config, prepared: Prepared) -> list[list[Any]]:
    """The samples of each record, as the loader makes them."""
    entry = prepared.entries["train"][0]
    processor = Processor.build(config, prepared.codec, prepared.states)
    encoder = RecordEncoder(config.data, processor)
    return [list(encoder.encode(entry, record, 0).samples) for record in range(entry.num_records)]


@pytest.mark.long
@pytest.mark.parametrize("max_seq_len", [24, 64, 1000])
@pytest.mark.parametrize("seed", [0, 1])
def test_scan_and_loader_count_the_same(max_seq_len: int, seed: int, model: Path, tmp_path: Path) -> None:
    shard = write(tmp_path / "a.jsonl", random_lines(seed, 40))
    config = config_of(model, shard, "data.overlong=truncate", "data.on_bad_sample=skip", max_seq_len=max_seq_len)
    prepared = prepare(config)
    entry = prepared.entries["train"][0]
    records = encode_all(config, prepared)
    for record, samples in enumerate(records):
        if samples:
            assert len(samples) == entry.num_samples[record]
            assert sum(len(sample.input_ids) for sample in samples) == entry.num_tokens[record]
            assert [sample.timestep for sample in samples] == list(range(len(samples)))
            assert all(len(sample.input_ids) <= max_seq_len and sample.supervised.any() for sample in samples)
    bad = sum(not samples and entry.num_samples[record] > 0 for record, samples in enumerate(records))
    assert bad == entry.num_bad < 10
    assert entry.total_samples > 40
    dataset = make_datasets(config.data)[0]
    problems = verify([entry], dataset, processes=1, progress=False, counting=Counting.needed(config, dataset))
    assert len(problems) == entry.num_bad
    assert problems == [] or "no label is left" in problems[0]


@pytest.mark.long
def test_it_is_counted_again_only_for_another_tokenizer_or_rule(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write(tmp_path / "a.jsonl", random_lines(3, 20))
    scans: list[Path] = []
    real = Language.scan_part

    def counting(self: Language, shard: Path, start: int, stop: int) -> Any:
        scans.append(shard)
        return real(self, shard, start, stop)

    monkeypatch.setattr(Language, "scan_part", counting)

    def scanned(*overrides: str, folder: Path = model, **more: Any) -> bool:
        scans.clear()
        prepare(config_of(folder, shard, "data.on_bad_sample=skip", *overrides, **more))
        return bool(scans)

    assert scanned()
    assert not scanned()
    assert not scanned("trainer.lr=1", "data.order.seed=4", "data.image.quality=80")
    assert scanned(max_seq_len=65)
    assert scanned("data.dialogue.template=chat_template")
    assert scanned("data.dialogue.end=<pad>")
    other = write_model(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert scanned(folder=other)
    before = prepare(config_of(other, shard, "data.on_bad_sample=skip")).entries["train"][0].fingerprint
    (other / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1))  # another file: who knows what it changes
    assert scanned(folder=other)
    assert prepare(config_of(other, shard, "data.on_bad_sample=skip")).entries["train"][0].fingerprint == before
    assert not scanned()
    # Dialogues are one row each: nobody asks for their tokens, until they are packed.
    write(tmp_path / "a.jsonl", [[{"turns": [["user", "Hi", False], ["assistant", "Hello", True]]}]] * 3)
    assert scanned(kind="Dialogues")
    assert not scanned(kind="Dialogues", max_seq_len=99)
    assert prepare(config_of(model, shard, kind="Dialogues")).entries["train"][0].num_tokens.tolist() == [0, 0, 0]
    config = config_of(model, shard, "data.packing=true", kind="Dialogues")
    packed = prepare(config).entries["train"][0]
    turns = [Turn(role="user", text="Hi"), Turn(role="assistant", text="Hello", learned=True)]
    length = len(Processor.build(config, None).encode_turns(turns).input_ids)
    assert (packed.num_samples.tolist(), packed.num_tokens.tolist()) == ([1, 1, 1], [length] * 3)
    weighed = prepare(config_of(model, shard, "data.weigh_by=tokens", kind="Dialogues")).entries["train"][0]
    assert weighed.num_tokens.tolist() == [length] * 3


@pytest.mark.process
def test_several_processes_find_the_same(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_pool, "MIN_POOL_BYTES", 0)
    monkeypatch.setattr("loader_service.prepare.run.MIN_POOL_BYTES", 0)
    monkeypatch.setattr(parts_module, "PART_BYTES", 3000)
    shard = write(tmp_path / "a.jsonl", random_lines(5, 40))
    config = config_of(model, shard, "data.overlong=truncate", max_seq_len=200)
    one, two = (
        prepare(cached_in(tmp_path / f"cache-{n}", config), scan=ScanOptions(processes=n)).entries["train"][0]
        for n in (1, 2)
    )
    assert one.num_samples.tolist() == two.num_samples.tolist()
    assert one.num_tokens.tolist() == two.num_tokens.tolist()
    assert one.fingerprint == two.fingerprint


def test_bad_records_are_named_or_keep_their_place(model: Path, tmp_path: Path) -> None:
    lines = [[{"text": "good"}], [{"text": "x"}, {"bad": "a broken line"}], [{"turns": [["user", "Hi", False]]}]]
    shard = write(tmp_path / "a.jsonl", lines)
    with pytest.raises(DataError, match=rf"{shard}: record at offset 19: bad: a broken line"):
        prepare(config_of(model, shard))
    config = config_of(model, shard, "data.on_bad_sample=skip")
    prepared = prepare(config)
    entry = prepared.entries["train"][0]
    assert (entry.num_samples.tolist(), entry.num_bad) == ([1, 2, 1], 2)
    assert "none of the 1 turns is learned" in entry.errors[1]
    assert [len(samples) for samples in encode_all(config, prepared)] == [1, 0, 0]


@pytest.mark.long
@pytest.mark.parametrize("switch", ["packing", "options.validate"])
@pytest.mark.parametrize("answer", ["", "far too long " * 60])
def test_a_bad_dialogue_is_named_by_its_place_whoever_finds_it(
    switch: str, answer: str, model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("pyarrow")
    from pyarrow import Table, parquet

    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}]}
        for said in ("a", "b", answer, "d")
    ]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    parquet.write_table(Table.from_pylist(rows), tmp_path / "a.parquet")
    if answer and switch != "packing":  # nobody counts its tokens
        return
    for name, place in (("a.jsonl", ":3"), ("a.parquet", ": record row 2"), ("a.json", r": record 2 \(byte \d+\)")):
        paths = f"data.train_data_paths=[{tmp_path / name}]"
        config = make_config(model, "data.dataset_type=chat", f"data.{switch}=true", paths, max_seq_len=64)
        with pytest.raises(DataError, match=rf"^{tmp_path / name}{place}(, field messages)?: "):
            prepare(config)


def test_texts_that_give_no_row_are_counted(model: Path, tmp_path: Path) -> None:
    """A tokenizer may drop all that a text says; a single id has nothing in front of it from which it would be learned."""
    shard = write(tmp_path / "a.jsonl", [[{"input_ids": [9]}], [{"input_ids": [9, 8]}, {"text": ""}], []])
    entry = prepare(config_of(model, shard)).entries["train"][0]
    assert (entry.num_samples.tolist(), entry.num_bad) == ([0, 1, 0], 0)
    assert entry.notes == {"left out: no token to learn": 2}


def test_a_class_that_does_not_say_it_is_text_is_told(model: Path, tmp_path: Path) -> None:
    shard = write(tmp_path / "a.jsonl", [[{"text": "a long text, much longer than a row"}]])
    config = config_of(model, shard, kind="States", max_seq_len=8)
    prepared = Prepared(entries=prepare(config_of(model, shard, max_seq_len=999)).entries, codec=None)
    with pytest.raises(DataError, match=r"gives more samples than the scan counted; .*sets is_text"):
        encode_all(config, prepared)
    write(shard, [[{"instruction": "a", "answer": "b", "state": [1]}]])
    with pytest.raises(DataError, match=r"Language.is_text is set, and `read` gives a sample without turns"):
        prepare(config_of(model, shard))


STATES = np.random.default_rng(0).normal(0, 3, (400, 3)).astype(np.float32)


def write_states(path: Path, states: Any = STATES) -> Path:
    samples = [{"instruction": "push", "answer": "ok", "state": [float(x) for x in state]} for state in states]
    return write(path, [samples[i : i + 50] for i in range(0, len(samples), 50)])


@pytest.mark.long
def test_states_are_scaled_by_the_train_data(model: Path, tmp_path: Path) -> None:
    shard = write_states(tmp_path / "a.jsonl")
    config = config_of(model, shard, "data.state=text", kind="States")
    prepared = prepare(config)
    assert prepared.states is not None
    assert prepared.states.q01 == pytest.approx(np.quantile(STATES.astype(np.float64), 0.01, axis=0))
    processor = Processor.build(config, None, prepared.states)
    first = encode_all(config, prepared)[0][0]
    assert np.array_equal(first.input_ids, processor.encode("push", 0, answer="ok", state=STATES[0]).input_ids)
    assert prepare(config_of(model, shard, kind="States")).states is None  # unasked
    without = config_of(model, write(tmp_path / "b.jsonl", [[{"text": "x"}]]), "data.state=text")
    with pytest.raises(ConfigError, match=r"data.state is text, and the train data has no states"):
        prepare(without)


def test_a_scale_of_states_from_a_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = [write_states(tmp_path / "a.jsonl", STATES[:200]), write_states(tmp_path / "b.jsonl", STATES[200:])]
    names = ",".join(map(str, shards))
    config = config_of(model, shards[0], f"data.train_data_paths=[{names}]", "data.state=text", kind="States")
    with pytest.raises(ConfigError, match=r"not all of that is here: run `loader-prepare --state-out FILE`"):
        prepare(config, held={"train": [1]})
    whole = prepare(config).states
    arguments = ["--config", str(model / "stoker.yaml"), "--set", f"data.dataset_type={MODULE}:States"]
    arguments += ["--set", f"data.train_data_paths=[{names}]", "--set", "data.state=text", "--json"]
    assert cli.main([*arguments, "--state-out", str(tmp_path / "states.json")]) == 0
    capsys.readouterr()
    given = replace(config, data=replace(config.data, state_path=str(tmp_path / "states.json")))
    part = prepare(given, held={"train": [1]}).states
    assert part is not None
    assert whole is not None
    assert part.to_json() == whole.to_json()
    (tmp_path / "states.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"data.state_path is .*not what `loader-prepare --state-out FILE` writes"):
        prepare(given)


@pytest.mark.parametrize(
    ("lines", "kind", "overrides", "message"),
    [
        (
            [[{"instruction": "push it", "answer": "a " * 99, "state": [0]}]],
            "States",
            [],
            r"needs \d+ tokens .*max_seq_len is 64",
        ),
        (
            [[{"turns": [["user", "a " * 99, False], ["assistant", "b", True]]}]],
            "Dialogues",
            [],
            r"dialogue of 2 turns needs \d+ tokens .*max_seq_len is 64: raise it, or set data.overlong",
        ),
        (
            [[{"turns": [["user", "a", False], ["assistant", "b", True], ["user", "c", False]]}]],
            "Dialogues",
            ["data.dialogue.template=openvla"],
            r"not user, assistant, user: use stoker or chat_template",
        ),
    ],
)
def test_what_can_never_be_a_row_is_said_at_the_start(
    lines: Any, kind: str, overrides: list[str], message: str, model: Path, tmp_path: Path
) -> None:
    shard = write(tmp_path / "a.jsonl", lines)
    for policy in ("fail", "skip"):
        config = config_of(model, shard, f"data.on_bad_sample={policy}", *overrides, kind=kind)
        prepared = prepare(config)
        with pytest.raises(RowError, match=message) as caught:
            check_first_records(config, prepared, Processor.build(config, None))
        assert str(caught.value).startswith(f"{shard}: record 0, field data.train_data_paths[0]")


def test_bad_samples_are_no_reason_not_to_start(model: Path, tmp_path: Path) -> None:
    shard = write(tmp_path / "a.jsonl", [[{"bad": "x"}], [{"turns": [["user", "Hi", False]]}]])
    config = config_of(model, shard, kind="Dialogues")
    check_first_records(config, prepare(config), Processor.build(config, None))


def test_mended_dialogues_are_counted_where_their_tokens_are(model: Path, tmp_path: Path) -> None:
    turns = [("user", "Hi"), ("user", "you"), ("assistant", "Hello"), ("user", "Bye")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    shard = tmp_path / "chats.jsonl"
    shard.write_text(f"{json.dumps(row)}\n" * 3)

    def notes(*overrides: str) -> dict[str, int]:
        paths = f"data.train_data_paths=[{shard}]"
        config = make_config(
            model, "data.dataset_type=chat", "data.overlong=truncate", paths, *overrides, max_seq_len=64
        )
        return dict(prepare(config).entries["train"][0].notes)

    assert notes() == {}
    assert notes("data.packing=true") == notes("data.options.validate=true") == {MERGED: 3, TRAILING: 3}


def test_a_template_that_rewrites_history_is_counted_row_by_row(tmp_path: Path) -> None:
    """One row for each answer: scan, verify and loader agree, with and without packing; other templates have one each."""
    folder = write_model_folder(tmp_path / "model", "causal")
    (folder / "chat_template.jinja").write_text(plain(REASONING))
    exchange = [["user", "Hi", False], ["assistant", "Hello", True]]
    shard = write(tmp_path / "a.jsonl", [[{"turns": exchange * count}] for count in (1, 3, 2)])
    of_stoker = prepare(config_of(folder, shard, kind="Dialogues")).entries["train"][0]
    assert of_stoker.num_samples.tolist() == [1, 1, 1]
    for overrides in ([], ["data.packing=true"]):
        config = config_of(folder, shard, "data.dialogue.template=auto", *overrides, kind="Dialogues", max_seq_len=256)
        prepared = prepare(config)
        entry = prepared.entries["train"][0]
        assert entry.num_samples.tolist() == [1, 3, 2]
        records = encode_all(config, prepared)
        assert [len(samples) for samples in records] == [1, 3, 2]
        assert entry.num_tokens.tolist() == [sum(len(s.input_ids) for s in samples) for samples in records]
        assert [sample.timestep for sample in records[1]] == [0, 1, 2]
        lengths = [len(sample.input_ids) for sample in records[1]]
        assert lengths == sorted(set(lengths)), "each row has one more exchange"
        dataset = make_datasets(config.data)[0]
        counting = Counting.needed(config, dataset)
        assert verify([entry], dataset, processes=1, progress=False, counting=counting) == []
