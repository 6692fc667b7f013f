"""Kill and resume: the same batches, the same losses bit for bit, the same weights; also on another number of ranks."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch

from stoker_proto.config import Config
from stoker_proto.errors import ConfigError, RefusedError
from stoker_proto.run_record import RunRecord
from tests.trainer.support.memory import make_config
from tests.trainer.support.ranks import run_ranks
from tests.trainer.support.runs import FINGERPRINTS, build_run, digests, run, weights

CHECKPOINT = {"interval": 3, "keep": 10}
pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def straight(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, two epochs, eight steps without a stop; with dropout, so that random generators matter."""
    folder = tmp_path_factory.mktemp("straight")
    config = make_config(tiny_llava, folder, epochs=2, weight_decay=0.1, checkpoint=CHECKPOINT)
    run_ranks(2, lambda rank: run(config, dropout=0.2))
    return folder


def test_a_killed_run_goes_on_as_if_nothing_had_been(straight: Path, tiny_llava: Path, tmp_path: Path) -> None:
    config = make_config(tiny_llava, tmp_path, epochs=2, weight_decay=0.1, checkpoint=CHECKPOINT)
    killed = run_ranks(2, lambda rank: run(config, dropout=0.2, fail_at=(1, 8)))  # five steps done, three saved
    saved = tmp_path / "checkpoints" / "step-00000003"
    where = f"at step 5 of 8: the newest checkpoint is {saved}, and the same command resumes from it"
    assert killed == [where, where]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    said = run_ranks(2, lambda rank: last_line(config))[0]
    newest = tmp_path / "checkpoints" / "step-00000008"
    assert (
        said == f"training is over after 8 steps; export: {tmp_path / 'export'}, of step 8; newest checkpoint: {newest}"
    )
    for rank in range(2):
        expected, found = digests(straight, rank), digests(tmp_path, rank)
        assert [line["step"] for line in expected] == list(range(1, 9))
        assert found == expected[:5] + expected[3:], "the batches and the losses, all digits"
        assert [len(rows) for rows in found[0]["rows"]] == [2 * 2 * 3] * 2  # two rows a micro-batch, three bytes each
    record = RunRecord.read(tmp_path, found[0]["record"])
    assert (record.world_size, record.pass_samples, record.fingerprints) == (2, (29,), FINGERPRINTS)
    assert record.read_config().data == config.data
    assert len(list((tmp_path / "record").iterdir())) == 1  # of both starts
    expected_weights, found_weights = weights(straight / "export"), weights(tmp_path / "export")
    assert all(torch.equal(found_weights[name], tensor) for name, tensor in expected_weights.items())


def last_line(config: Config) -> str:
    """What the loop logs at the end of a run."""
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    log = logging.getLogger("trainer.loop")
    log.setLevel(logging.INFO)
    log.addHandler(Lines())
    run(config, dropout=0.2)
    return lines[-1]


@pytest.fixture(scope="module")
def without_dropout(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `straight`; on another number of ranks dropout would fall elsewhere."""
    folder = tmp_path_factory.mktemp("without_dropout")
    config = make_config(tiny_llava, folder, epochs=2, weight_decay=0.1, checkpoint=CHECKPOINT, export=False)
    run_ranks(2, lambda rank: run(config))
    return folder


@pytest.mark.parametrize(
    ("before", "after"), [pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(1, 2, marks=pytest.mark.slow)]
)
def test_another_number_of_ranks_trains_the_same_global_batches(
    before: int, after: int, without_dropout: Path, tiny_llava: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_llava, tmp_path, epochs=2, weight_decay=0.1, checkpoint=CHECKPOINT, export=False)
    if before == 2:  # the straight run, as if it had been killed after three steps
        shutil.copytree(without_dropout / "checkpoints" / "step-00000003", tmp_path / "checkpoints" / "step-00000003")
    else:
        run_ranks(before, lambda rank: run(config, fail_at=(0, 24)))

    def refused(rank: int) -> str:
        with pytest.raises(ConfigError) as caught:
            build_run(config)
        return str(caught.value)

    assert "trainer.checkpoint.universal=true" in run_ranks(after, refused)[0]

    universal = make_config(
        tiny_llava, tmp_path, epochs=2, weight_decay=0.1, checkpoint={**CHECKPOINT, "universal": True}, export=False
    )
    run_ranks(after, lambda rank: run(universal))
    expected = {line["step"]: line["loss"] for line in digests(without_dropout)}
    found = [(line["step"], line["loss"]) for line in digests(tmp_path)][-5:]
    assert [step for step, _ in found] == [4, 5, 6, 7, 8]
    for step, loss in found:
        assert loss == pytest.approx(expected[step], abs=1e-5), f"step {step}"


def test_another_meaning_of_the_data_is_refused(straight: Path, tiny_llava: Path, tmp_path: Path) -> None:
    shutil.copytree(straight / "checkpoints" / "step-00000003", tmp_path / "checkpoints" / "step-00000003")
    config = make_config(tiny_llava, tmp_path, epochs=2)

    def refused(rank: int) -> str:
        with pytest.raises(RefusedError) as caught:
            build_run(config, fingerprints={**FINGERPRINTS, "codec": "d" * 64})
        return str(caught.value)

    message = run_ranks(1, refused)[0]
    assert "codec cccccccccccc -> dddddddddddd" in message
    assert "trainer.checkpoint.resume=null" in message
