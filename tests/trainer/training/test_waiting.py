"""The host reads one thing of a step, at its end or when the next one has begun; and all copies to a device are made ahead."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from stoker_proto.config import CheckpointConfig, Config
from tests.trainer.support.memory import MemoryFeed, make_config, make_examples, make_processor
from tests.trainer.support.ranks import run_ranks
from tests.trainer.support.runs import build_run, digests
from trainer.build import build_engine, build_stepper
from trainer.checkpoints.save import Checkpoints
from trainer.engine.zero import join_ranks
from trainer.training.inputs import InputMaker
from trainer.training.source_table import SourceTable

WAITS = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero"}
"""Methods of a tensor for whose answer the host waits."""
WAITING_OPERATORS = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.is_nonzero"}


class Waits(TorchFunctionMode):
    """Counts, by the package that asks, what would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.operators = Operators(self)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in WAITS:
            self.add(name)
        return func(*args, **(kwargs or {}))

    def add(self, name: str) -> None:
        """For the package of the nearest frame that is none of torch's or this file's."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            package = frame.f_globals.get("__name__", "").partition(".")[0]
            if package not in ("torch", "tests"):
                self.found[f"{package}: {name}"] += 1
                return
            frame = frame.f_back

    def ours(self) -> dict[str, int]:
        """What the trainer asked for."""
        return {name: count for name, count in self.found.items() if name.startswith("trainer")}


class Operators(TorchDispatchMode):
    """The same below Python: what operators ask for."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.name()).replace("::", ".").partition(".")
        operator = f"{name[0]}.{name[2].partition('.')[0]}"
        by_mask = operator == "aten.index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        if operator in WAITING_OPERATORS or by_mask:
            self.waits.add(operator)
        return func(*args, **(kwargs or {}))


def count_waits(config: Config, sources: SourceTable) -> list[tuple[dict[str, int], dict[str, int], list[str]]]:
    """(in begin, in result, all that others asked for) of each step of 4 micro-batches."""
    ranks = join_ranks()
    processor = make_processor(config)
    engine = build_engine(config, ranks, processor, Checkpoints(config, ranks), None)
    stepper = build_stepper(engine, config, processor, ranks, sources)
    feed = MemoryFeed(make_examples(24, seed=1), config, processor, 0, 1)
    feed.copy_ahead(stepper.make_inputs.copy)
    counted = []
    for step in feed.steps(0, 0):
        waits, later = Waits(), Waits()
        with waits, waits.operators:
            begun = stepper.begin(step.micro_batches, step.step, lambda: (0.0, 2.5))
        with later, later.operators:
            result = begun.result()
        assert result.num_rows == 8
        assert result.applied
        assert result.worst == (0.0, 2.5)
        counted.append((waits.ours(), later.ours(), sorted(waits.found)))
    return counted


@pytest.mark.process
def test_a_step_waits_for_nothing_and_its_figures_are_one_read(tiny_llava: Path, tmp_path: Path) -> None:
    config = make_config(tiny_llava, tmp_path, zero_stage=1)
    two = SourceTable(("robot", "text"), (0, 1), (16, 8))
    [counted] = run_ranks(1, lambda rank: count_waits(config, two))
    for ours, later, others in counted:
        assert ours == {}
        assert later == {"trainer: tolist": 1}
        assert any(name.startswith("deepspeed") for name in others), (
            "what is not ours is seen too: DeepSpeed reads the norm"
        )


def test_a_batch_is_copied_ahead_and_not_again(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tiny_llava, tmp_path)
    processor = make_processor(config)
    from trainer.models.families import family_of, read_model_config

    make_inputs = InputMaker(
        processor, family_of(read_model_config(str(tiny_llava))), torch.device("cpu"), torch.float32
    )
    feed = MemoryFeed(make_examples(8, seed=1), config, processor, 0, 1)
    batch = feed.batch(0, 0, 2)
    expected = make_inputs(batch)
    batch.on_device = make_inputs.copy(batch)
    names = {"input_ids", "attention_mask", "pixels", "positions", "targets", "labels", "auxiliary"}
    assert set(batch.on_device.tensors) == names
    monkeypatch.setattr(make_inputs, "copy", None)  # a second copy would be an error
    for array in (batch.input_ids, batch.labels):
        array[:] = 0  # what is on the device stays
    found = make_inputs(batch)
    for name in ("positions", "targets", "labels", "auxiliary"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.arguments.keys() == expected.arguments.keys()
    assert torch.equal(found.arguments["pixel_values"], expected.arguments["pixel_values"])


def run_late(config: Config, *, late: bool) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    trainer = build_run(config, images=False)
    trainer.reads_late = late
    began: list[str] = []
    begin, validate = trainer._begin, trainer.evals.after_step

    def noted(batch: Any, number: int) -> Any:
        began.append(f"begin {number}, known {trainer.cursor.step}")
        return begin(batch, number)

    trainer._begin = noted  # type: ignore[method-assign]
    trainer.evals.after_step = lambda step, moment: began.append(f"after {step}") or validate(step, moment)  # type: ignore[func-returns-value,method-assign]
    summary = trainer.run()
    folder = Path(config.trainer.output_dir)
    return summary, digests(folder), [*began, *sorted(path.name for path in (folder / "checkpoints").iterdir())]


@pytest.mark.process
@pytest.mark.slow
def test_figures_that_are_read_a_step_late_are_the_same(tiny_causal: Path, tmp_path: Path) -> None:
    """Steps 3 and 6 have a checkpoint, step 4 ends an epoch, 7 is the last: nothing begins before they are known."""
    found = {}
    for late in (False, True):
        checkpoint = {"interval": 3, "keep": 5}
        config = make_config(
            tiny_causal,
            tmp_path / str(late),
            epochs=2,
            max_steps=7,
            checkpoint=checkpoint,
            eval_interval=6,
            export=False,
        )
        assert config.trainer.checkpoint == CheckpointConfig(**checkpoint)
        [found[late]] = run_ranks(1, lambda rank, config=config, late=late: run_late(config, late=late))
    (summary, rows, order), (late_summary, late_rows, late_order) = found[False], found[True]
    assert late_rows == rows
    assert len(rows) == 7
    for name in ("steps", "samples", "sources", "val"):
        assert late_summary[name] == summary[name], name
    for name in ("loss", "accuracy", "grad_norm", "lr"):
        assert late_summary["train"][name] == summary["train"][name], name
    assert order[:4] == ["begin 0, known 0", "after 1", "begin 1, known 1", "after 2"]
    assert late_order == [
        *("begin 0, known 0", "begin 1, known 0", "after 1", "begin 2, known 1", "after 2", "after 3"),
        *("begin 3, known 3", "after 4", "begin 4, known 4", "begin 5, known 4", "after 5", "after 6"),
        *("begin 6, known 6", "after 7"),
        *("step-00000003", "step-00000006", "step-00000007"),
    ]  # fmt: skip
