"""A rank that waits for another one ends with an error when `trainer.collective_timeout_s` is over."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.fleet import wait_until
from tests.trainer.support.ranks import run_ranks
from trainer.engine.ranks import wait_for_all_ranks
from trainer.engine.zero import join_ranks

pytestmark = pytest.mark.process


def wait_alone(folder: Path, rank: int) -> str:
    """The first rank waits; the second one comes only when the first has given up."""
    join_ranks(timeout_s=1.0 if rank == 0 else 600.0)
    if rank == 1:
        wait_until((folder / "gave-up").exists, 250, "the first rank's error")
        return "never asked"
    try:
        wait_for_all_ranks()
    except RuntimeError as error:
        (folder / "gave-up").touch()
        return type(error).__name__
    return "met"


def test_the_wait_for_another_rank_is_bounded(tmp_path: Path) -> None:
    first, second = run_ranks(2, lambda rank: wait_alone(tmp_path, rank))
    assert first in ("RuntimeError", "DistBackendError", "DistNetworkError")
    assert second == "never asked"
