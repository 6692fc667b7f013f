"""Ranks that were answered by different loaders must not train together."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from stoker_proto.errors import RefusedError
from tests.trainer.feed.fake_loader import FINGERPRINTS, FakeLoader, StandInDecoder, make_config
from tests.trainer.support.ranks import run_ranks
from trainer import build
from trainer.checkpoints.state import Checkpoint, Cursor, state_of_run
from trainer.engine.ranks import Ranks
from trainer.feed.batch import Decoding
from trainer.feed.feed import Feed

SAME = {"codec": "a", "manifest/train/0": "b"}


def _refusals(of_ranks: list[dict[str, str]]) -> list[str]:
    """What each rank says to these fingerprints, "" where it goes on."""

    def work(rank: int) -> str:
        from trainer.build import check_same_on_all_ranks
        from trainer.engine.zero import join_ranks

        try:
            check_same_on_all_ranks(of_ranks[rank], join_ranks())
        except RefusedError as error:
            return str(error)
        return ""

    return run_ranks(2, work)


@pytest.mark.process
@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (SAME, ""),
        ({**SAME, "codec": "c"}, "loaders that differ in codec:"),
        ({"codec": "a"}, "loaders that differ in what they hold:"),
    ],
)
def test_every_rank_compares_its_pins_with_all_others(other: dict[str, str], expected: str) -> None:
    for said in _refusals([SAME, other]):
        assert bool(said) == bool(expected)
        assert expected in said


@pytest.fixture
def feeds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Feed]]:
    """Filled by `open_split`."""
    monkeypatch.setattr(build, "Decoding", partial(Decoding, processor=StandInDecoder()))
    opened: list[Feed] = []
    yield opened
    for feed in opened:
        feed.close()


def open_resumed(feeds: list[Feed], folder: Path, address: str, fingerprints: dict[str, str]) -> dict[str, str]:
    """The fingerprints of a run that goes on from a checkpoint with these."""
    config = make_config([address])
    checkpoint = Checkpoint(folder=folder, state=state_of_run(config, 1, 1, Cursor(), fingerprints))
    ranks = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    return build.open_split(config, "train", ranks, feeds, checkpoint)[1].fingerprints


def test_on_a_resume_the_loader_that_differs_is_named_though_it_answers_first(
    feeds: list[Feed], tmp_path: Path
) -> None:
    """It pinned its own codec, and the loader that agrees with the checkpoint was the one refused."""
    with FakeLoader(fingerprints={"codec": "of a stranger"}) as stranger, pytest.raises(RefusedError) as caught:
        open_resumed(feeds, tmp_path, stranger.address, dict(FINGERPRINTS))
    said = f"the loader at {stranger.address} is refused: codec: the loader has of a stranger, this rank c1"
    assert said in str(caught.value)
    assert f"{tmp_path} is resumed" in str(caught.value)


def test_a_resume_compares_only_what_matters_and_keeps_what_the_loaders_say(feeds: list[Feed], tmp_path: Path) -> None:
    fingerprints = {**FINGERPRINTS, "image_libraries": "1", "manifest/val/0": "other", "manifest/train/7": "gone"}
    with FakeLoader(fingerprints={"image_libraries": "2"}) as loader:
        found = open_resumed(feeds, tmp_path, loader.address, fingerprints)
        assert loader.hellos[0].fingerprints.items() >= {**FINGERPRINTS, "manifest/train/7": "gone"}.items()
    assert found["image_libraries"] == "2"
    assert "manifest/train/7" not in found, "the checkpoint's check must see that it is gone"
