"""Dialogues and plain text through real loaders: every row once, and the perplexity of its labels."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from loader_service.prepare.run import prepare
from stoker_proto.config.reader import load_config
from stoker_proto.processor import Processor
from stoker_proto.text.turns import Turn
from tests.end_to_end.fleet import pull, run_cli, serving, write_config
from tests.tiny_models import write_model_folder

TEXTS = [f"def f_{i}(x):\n    return x + {i}\n" * (1 + i % 5) for i in range(23)]
DIALOGUES = [
    [
        ["user", f"What is {i}?", False],
        ["assistant", f"It is {i}.", True],
        ["user", "Sure?", False],
        ["assistant", "Yes", True],
    ]
    for i in range(17)
]


def write_language(folder: Path) -> Path:
    records = [[{"text": text}] for text in TEXTS] + [[{"turns": turns}] for turns in DIALOGUES]
    shard = folder / "language.jsonl"
    shard.write_text("".join(json.dumps(record) + "\n" for record in records))
    return shard


def rows_of(processor: Processor) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of everything in the shard, straight from the processor."""
    rows = [row for text in TEXTS for row in processor.texts.of_text(text)]
    for turns in DIALOGUES:
        rows.append(processor.encode_turns([Turn(role=r, text=t, learned=x) for r, t, x in turns]))  # type: ignore[arg-type]
    return [(row.input_ids.tolist(), row.supervised.tolist()) for row in rows]


def config_of(tmp_path: Path, model: Path, **data: object) -> Path:
    shard = write_language(tmp_path)
    kind = "tests.loader_service.dataset_classes:Language"
    return write_config(
        tmp_path, model, [shard], dataset_type=kind, val_data_paths=[str(shard)], max_seq_len=48, **data
    )


def test_every_row_once_whatever_the_loaders_and_ranks(tmp_path: Path) -> None:
    config = config_of(tmp_path, write_model_folder(tmp_path / "model", "causal"))
    expected = len(rows_of(Processor.build(load_config(config), None)))
    assert prepare(load_config(config)).entries["train"][0].total_samples == expected > len(TEXTS) + len(DIALOGUES)
    with serving(config) as one, serving(config) as other:
        first = pull(config, [one.address])
        second = pull(config, [one.address, other.address], ranks=2)
    assert len(first.keys) == len(set(first.keys)) == expected
    assert first.steps == second.steps
    assert first.skipped == []


def test_a_row_that_can_never_fit_ends_the_start(tmp_path: Path) -> None:
    config = config_of(tmp_path, write_model_folder(tmp_path / "model", "llava"))
    tree = config.read_text().replace("max_seq_len: 48", "max_seq_len: 17")
    shard = tmp_path / "language.jsonl"
    shard.write_text(json.dumps([{"turns": DIALOGUES[0]}]) + "\n")
    config.write_text(tree.replace("classes:Language", "classes:Dialogues"))
    done = run_cli("serve", "--config", str(config))
    assert done.returncode == 1
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith(f"loader-serve: {shard}: record 0, field data.train_data_paths[0]: ")
    )
    assert "the dialogue of 4 turns needs" in done.stderr
    assert "data.max_seq_len is 17" in done.stderr


def test_validation_perplexity_is_that_of_the_labels(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from trainer.evals.scores import Sums, add_scores
    from trainer.feed.feed import Feed
    from trainer.models.families import family_of, read_model_config
    from trainer.models.tiny import build_tiny
    from trainer.training.inputs import InputMaker

    build_tiny("causal", tmp_path / "model")
    config = config_of(tmp_path, tmp_path / "model")
    family = family_of(read_model_config(str(tmp_path / "model")))
    model = family.auto_class.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    processor = Processor.build(load_config(config), None)
    sums = Sums(0)
    with serving(config) as loader, torch.no_grad():
        loaded = load_config(config, [f"cluster.loader_addresses=[{loader.address}]"])
        feed = Feed(loaded, "val", 0, 1)
        try:
            feed.connect(0)
            make_inputs = InputMaker(processor, family, torch.device("cpu"), torch.float32)
            for step in feed.steps(0, 0):
                for batch in step.micro_batches:
                    inputs = make_inputs(batch)
                    logits = model(**inputs.arguments).logits[:, inputs.positions]
                    add_scores(sums, logits, inputs.targets, np.asarray(batch.actions), processor)
        finally:
            feed.close()
    nll, tokens = 0.0, 0
    with torch.no_grad():
        for ids, labels in rows_of(processor):
            scores = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], -1)
            for position in np.flatnonzero(labels).tolist():
                nll -= scores[position - 1, ids[position]].item()
                tokens += 1
    metrics = sums.metrics()
    assert sums.tokens == tokens
    assert metrics["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
    assert set(metrics) == {"samples", "perplexity", "accuracy"}
