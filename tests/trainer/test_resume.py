"""Kill and resume: the same batches, the same losses bit for bit, the same weights; also on another number of ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.trainer.support.memory import make_config
from tests.trainer.support.ranks import run_ranks
from tests.trainer.support.runs import digests, run, weights

CHECKPOINT = {"interval": 3, "keep": 10}
pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def straight(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, two epochs, eight steps without a stop; dropout is on, so that random generators matter."""
    folder = tmp_path_factory.mktemp("straight")
    config = make_config(tiny_llava, folder, epochs=2, checkpoint=CHECKPOINT)
    run_ranks(2, lambda rank: run(config, dropout=0.1))
    return folder


def test_a_killed_run_goes_on_as_if_nothing_had_been(straight: Path, tiny_llava: Path, tmp_path: Path) -> None:
    config = make_config(tiny_llava, tmp_path, epochs=2, checkpoint=CHECKPOINT)
    killed = run_ranks(2, lambda rank: run(config, dropout=0.1, fail_at=(1, 8)))  # five steps done, three saved
    assert killed == ["killed", "killed"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    run_ranks(2, lambda rank: run(config, dropout=0.1))
    for rank in range(2):
        expected, found = digests(straight, rank), digests(tmp_path, rank)
        assert [line["step"] for line in expected] == list(range(1, 9))
        assert found == expected[:5] + expected[3:], "the batches and the losses, all digits"
    expected_weights, found_weights = weights(straight / "export"), weights(tmp_path / "export")
    assert all(torch.equal(found_weights[name], tensor) for name, tensor in expected_weights.items())


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_ranks_goes_on_with_the_same_global_batches(
    before: int, after: int, straight: Path, tiny_llava: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_llava, tmp_path, epochs=2, checkpoint=CHECKPOINT)
    if before == 2:  # the first three steps of the straight run
        shutil.copytree(straight / "checkpoints" / "step-00000003", tmp_path / "checkpoints" / "step-00000003")
    else:
        run_ranks(before, lambda rank: run(config, dropout=0.0, fail_at=(0, 24)))
    universal = make_config(tiny_llava, tmp_path, epochs=2, checkpoint={**CHECKPOINT, "universal": True})
    run_ranks(after, lambda rank: run(universal, dropout=0.0))
    ...
