"""Ranks that were answered by different loaders must not train together."""

from __future__ import annotations

import pytest

from stoker_proto.errors import RefusedError
from tests.trainer.support.ranks import run_ranks

SAME = {"codec": "a", "manifest/train/0": "b"}


def _refusals(of_ranks: list[dict[str, str]]) -> list[str]:
    """What each rank says to these fingerprints, "" where it goes on."""

    def work(rank: int) -> str:
        from trainer.build import check_same_on_all_ranks
        from trainer.zero import join_ranks

        try:
            check_same_on_all_ranks(of_ranks[rank], join_ranks())
        except RefusedError as error:
            return str(error)
        return ""

    return run_ranks(2, work)


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
