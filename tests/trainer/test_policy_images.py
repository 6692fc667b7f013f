"""A policy takes as many images as its model was trained with; the trainer sees how many those are, over ranks and resumes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stoker_proto.errors import DataError
from stoker_proto.processor import Processor
from tests.trainer.support.memory import make_config, make_processor
from tests.trainer.support.ranks import run_ranks
from tests.trainer.support.runs import run
from trainer.engine.ranks import range_over_ranks
from trainer.engine.zero import join_ranks
from trainer.loop import images_of_actions
from trainer.models.families import family_of, read_model_config
from trainer.policy import Policy

FRAME = np.zeros((64, 64, 3), np.uint8)


def policy_of(model: Path, processor: Processor) -> Policy:
    family = family_of(read_model_config(str(model)))
    return Policy(family.auto_class.from_pretrained(model, dtype=torch.float32), processor, family)


@pytest.mark.long
@pytest.mark.parametrize(
    ("seen", "good", "bad", "expected"),
    [
        ((1, 1), [1], [0, 3], "have 1 "),
        ((2, 2), [2], [0, 1, 3], "have 2 "),
        ((1, 2), [1, 2], [0, 3], "have 1 to 2 "),
        ((0, 0), [0], [1], "have 0 "),
        (None, [1, 2], [0], "have 1 or more "),
    ],
)
def test_another_number_of_images_is_refused(
    seen: tuple[int, int] | None, good: list[int], bad: list[int], expected: str, tiny_llava: Path, tmp_path: Path
) -> None:
    make_processor(make_config(tiny_llava, tmp_path)).with_num_images(seen).save(tmp_path / "saved")
    policy = policy_of(tiny_llava, Processor.load(tmp_path / "saved"))
    for number in good:
        assert np.isfinite(policy.act([FRAME] * number, "push")).all()
    for number in bad:
        with pytest.raises(DataError, match=rf"{number} images: .* {expected}.* camera.* image_history"):
            policy.act([FRAME] * number, "push")


def test_the_number_changes_no_fingerprint_and_no_older_json(tiny_llava: Path, tmp_path: Path) -> None:
    processor = make_processor(make_config(tiny_llava, tmp_path))
    knowing = processor.with_num_images((2, 2))
    assert "num_images" not in json.loads(processor.to_json())
    assert knowing.fingerprints() == processor.fingerprints()
    assert knowing.text_fingerprint == processor.text_fingerprint
    assert json.loads(knowing.to_json()) == {**json.loads(processor.to_json()), "num_images": [2, 2]}
    processor.save(tmp_path / "saved")
    for damaged in ([2, 1], [-1, 1], 2, [1]):
        text = json.dumps({**json.loads(processor.to_json()), "num_images": damaged})
        with pytest.raises(DataError, match="not the JSON of a processor"):
            Processor.from_json(text, tmp_path / "saved" / "tokenizer.json")


def test_rows_without_an_action_say_nothing() -> None:
    actions = np.zeros((4, 1, 3), np.float32)
    actions[1:3] = np.nan  # a caption with 5 images, and a bad sample's place
    mixed = SimpleNamespace(actions=actions, image_counts=np.array([2, 5, 0, 3]))
    words = SimpleNamespace(actions=np.zeros((2, 0, 0), np.float32), image_counts=np.array([7, 0]))

    def batch(*micro_batches: Any) -> Any:
        return SimpleNamespace(micro_batches=list(micro_batches))

    assert images_of_actions(batch(words), None) is None
    assert images_of_actions(batch(words, mixed), None) == (2, 3)
    assert images_of_actions(batch(mixed), (1, 2)) == (1, 3)


def say(seen: list[list[tuple[int, int] | None]], rank: int) -> list[tuple[int, int] | None]:
    ranks = join_ranks()
    return [range_over_ranks(of_ranks[rank], ranks) for of_ranks in seen]


@pytest.mark.process
def test_ranks_put_together_what_they_saw() -> None:
    seen: list[list[tuple[int, int] | None]] = [[(1, 1), (2, 3)], [None, (0, 0)], [None, None]]
    assert run_ranks(2, partial(say, seen)) == [[(1, 3), (0, 0), None]] * 2


def export_after_resume(config: Any, config_resumed: Any, rank: int) -> None:
    run(config)
    run(config_resumed)


@pytest.mark.process
def test_export_and_checkpoint_know_the_number(tiny_llava: Path, tmp_path: Path) -> None:
    """The resumed run trains no step: what it exports, it knows from the checkpoint."""
    keys: dict[str, Any] = {"max_steps": 1, "lr_schedule": "constant"}
    config = make_config(tiny_llava, tmp_path, export=False, **keys)
    resumed = make_config(tiny_llava, tmp_path, checkpoint={"resume": "auto"}, **keys)
    run_ranks(1, partial(export_after_resume, config, resumed))
    assert Processor.load(next(tmp_path.glob("checkpoints/step-*")) / "processor").num_images == (1, 1)
    policy = Policy.load(tmp_path / "export")
    assert policy.processor.num_images == (1, 1)
    with pytest.raises(DataError, match=r"3 images: .* have 1 "):
        policy.act([FRAME] * 3, "push")
