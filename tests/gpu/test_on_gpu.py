"""What only a GPU shows: no waiting in the middle of a step, copies from pinned memory on a stream of their own, flash attention.

Never run on a GPU so far. `make bench-gpu` is the other half.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stoker_proto.config import Config, LossConfig
from stoker_proto.processor import Processor
from tests.trainer.support.memory import MemoryFeed, make_config, make_examples, make_processor
from tests.trainer.training.test_packed import ONE_SOURCE, pack, text_piece
from trainer.build import build_engine, build_stepper, pinned_memory
from trainer.checkpoints.save import Checkpoints
from trainer.engine.zero import join_ranks, leave_ranks
from trainer.feed.batch import BatchBuilder, MicroBatch
from trainer.models.tiny import build_tiny
from trainer.training.step import Stepper, StepResult

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a GPU: nothing of this ran, and no other test does it"
    ),
    pytest.mark.filterwarnings("default"),  # of DeepSpeed and torch on machines that we do not know
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for family in ("llava", "causal"):
        build_tiny(family, folder / family)
    return {family: folder / family for family in ("llava", "causal")}


@pytest.fixture(autouse=True)
def _ranks() -> Iterator[None]:
    yield
    leave_ranks()


def build(config: Config, *, actions: bool = True) -> tuple[Stepper, Any]:
    """A stepper on the GPU, and its processor; no TF32, which has a bf16's digits."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    ranks, processor = join_ranks(), make_processor(config) if actions else Processor.build(config, None)
    assert ranks.device.type == "cuda"
    engine = build_engine(config, ranks, processor, Checkpoints(config, ranks), None)
    return build_stepper(engine, config, processor, ranks, ONE_SOURCE), processor


def batches_of(config: Config, processor: Any, *, images: bool = True) -> list[list[MicroBatch]]:
    feed = MemoryFeed(make_examples(24, seed=1, images=images), config, processor, 0, 1)
    return [step.micro_batches for step in feed.steps(0, 0)]


@pytest.mark.parametrize("chunk_labels", [0, 7])
def test_of_ours_nothing_waits_in_a_step(chunk_labels: int, models: dict[str, Path], tmp_path: Path) -> None:
    """torch says where the host waits; of all places in a step none is a file of the trainer."""
    config = make_config(models["llava"], tmp_path, zero_stage=1, loss=LossConfig(chunk_labels=chunk_labels))
    stepper, processor = build(config)
    first, second, _ = batches_of(config, processor)
    stepper.step(first, 0)  # what is made once
    for batch in second:
        batch.on_device = stepper.make_inputs.copy(batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            begun = stepper.begin(second, 1, lambda: (1.0, 2.0))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = {one.filename for one in caught if "synchroniz" in str(one.message)}
    assert not [place for place in places if "/trainer/" in place]
    result = begun.result()
    assert result.applied
    assert result.worst == (1.0, 2.0)


def test_a_batch_is_copied_from_pinned_memory_beside_the_computation(models: dict[str, Path], tmp_path: Path) -> None:
    config = make_config(models["llava"], tmp_path, zero_stage=1)
    stepper, processor = build(config)
    batch = batches_of(config, processor)[0][0]
    for name in ("input_ids", "attention_mask", "pixels", "auxiliary"):
        array = getattr(batch, name)
        pinned = pinned_memory(array.shape, array.dtype)
        pinned[:] = array
        assert torch.as_tensor(pinned).is_pinned(), name
        setattr(batch, name, pinned)
    torch.cuda._sleep(2_000_000_000)  # about a second of work on the stream that computes
    computing = torch.cuda.Event()  # type: ignore[no-untyped-call]
    computing.record()
    copied = stepper.make_inputs.copy(batch)
    assert copied.ready is not None
    copied.ready.synchronize()
    assert not computing.query(), "the copy did not wait for the computation"
    assert copied.tensors["input_ids"].device.type == "cuda"
    np.testing.assert_array_equal(copied.tensors["pixels"].cpu().numpy(), batch.pixels)


def steps_on(config: Config) -> list[StepResult]:
    stepper, processor = build(config)
    return [stepper.step(batches, number) for number, batches in enumerate(batches_of(config, processor))]


@pytest.mark.parametrize(("precision", "close"), [("fp32", 1e-5), ("bf16", 0.05)])
def test_chunks_change_nothing(precision: str, close: float, models: dict[str, Path], tmp_path: Path) -> None:
    found = [
        steps_on(
            make_config(
                models["llava"], tmp_path, precision=precision, zero_stage=3, loss=LossConfig(chunk_labels=size)
            )
        )
        for size in (0, 7)
    ]
    assert [r.loss for r in found[1]] == pytest.approx([r.loss for r in found[0]], rel=close)
    assert [r.grad_norm for r in found[1]] == pytest.approx([r.grad_norm for r in found[0]], rel=10 * close)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="the package flash-attn is not installed")
def test_packed_rows_lose_the_same_in_flash_attention(models: dict[str, Path], tmp_path: Path) -> None:
    losses = []
    for attention in ("sdpa", "flash"):
        config = make_config(models["causal"], tmp_path, precision="bf16", attention=attention, data={"packing": True})
        stepper, processor = build(config, actions=False)
        piece = pack(text_piece(processor, 6), [3, 3])
        batch = BatchBuilder(decoder=processor, num_rows=2, max_tokens=400, packing=True)([piece])
        minimised, _ = stepper.losses(stepper.make_inputs(batch))
        losses.append(minimised.float().tolist())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
