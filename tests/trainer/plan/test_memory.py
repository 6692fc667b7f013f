"""The plan's bytes are those that DeepSpeed holds and writes."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from stoker_proto.config import Config, LoraConfig
from tests.trainer.support.memory import MemoryFeed, make_config, make_examples, make_processor
from tests.trainer.support.ranks import run_ranks
from trainer.build import build_engine, build_stepper
from trainer.checkpoints.save import Checkpoints
from trainer.checkpoints.state import Cursor
from trainer.engine.zero import Engine, join_ranks
from trainer.models.families import read_model_config
from trainer.plan.memory import checkpoint_bytes, logit_bytes, memory_of_rank
from trainer.plan.shape import ModelShape, empty_model, shape_of
from trainer.training.source_table import SourceTable

MASTERS = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
GRADIENTS = ("grad_partitions_flat_buffer", "fp32_groups_gradients_flat", "averaged_gradients")
VARIANTS: list[dict[str, Any]] = [
    {"precision": "fp32", "zero_stage": 1},
    {"precision": "bf16", "zero_stage": 2},
    {"precision": "bf16", "zero_stage": 1},
    {"precision": "fp32", "zero_stage": 2, "ema_decay": 0.5},
    {"precision": "fp32", "zero_stage": 3},
    {"precision": "bf16", "zero_stage": 3, "lora": LoraConfig(rank=4)},
]


def tensors(value: Any) -> Iterable[torch.Tensor]:
    """All in lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def storage_bytes(found: Iterable[torch.Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values())


def bytes_of(found: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in found)


def held_gradients(engine: Engine) -> int:
    own = bytes_of(p.grad for p in engine.module.parameters() if p.grad is not None)
    flat = next(name for name in GRADIENTS if hasattr(engine.optimizer, name))  # others are views of the first one
    return own + bytes_of(tensors(getattr(engine.optimizer, flat)))


def measure(rank: int, config: Config) -> dict[str, int]:
    """Bytes that this rank holds, and those of a checkpoint."""
    ranks = join_ranks()
    processor = make_processor(config)
    checkpoints = Checkpoints(config, ranks)
    engine = build_engine(config, ranks, processor, checkpoints, None)
    stepper = build_stepper(engine, config, processor, ranks, SourceTable(("memory",), (0,), (1,)))
    feed = MemoryFeed(make_examples(8, seed=1, images=False), config, processor, rank, ranks.world_size)
    gradients: list[int] = []
    backward = engine.backward

    def and_look(*arguments: Any, **options: Any) -> Any:
        result = backward(*arguments, **options)
        gradients.append(held_gradients(engine))
        return result

    engine.backward = and_look
    for step in feed.steps(0, 0):
        stepper.step(step.micro_batches, 0)
    model, optimizer = engine.module, engine.optimizer
    masters = [t for name in MASTERS for t in tensors(getattr(optimizer, name, ()))]
    states = [t for t in tensors(dict(optimizer.optimizer.state)) if t.numel() > 1]
    parts = [p.ds_tensor for p in model.parameters() if hasattr(p, "ds_tensor")]
    folder = checkpoints.save(engine, Cursor(source_samples=(0,)), {"codec": "c"}, processor)
    return {
        "weights": storage_bytes([*model.parameters(), *model.buffers(), *parts]),
        "gradients": max(gradients),
        "optimizer": bytes_of(masters) + bytes_of(states),
        "checkpoint": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    }


def plan(config: Config) -> ModelShape:
    model_config = read_model_config(config.model.base_model_path)
    return shape_of(empty_model(config, model_config), config)


@pytest.mark.process
@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_rank_holds_what_was_planned(world_size: int, tiny_causal: Path, tmp_path: Path) -> None:
    variants = VARIANTS if world_size > 1 else VARIANTS[::4]  # each takes a second of CPU
    configs = [make_config(tiny_causal, tmp_path / str(n), **variant) for n, variant in enumerate(variants)]
    found = run_ranks(world_size, lambda rank: [measure(rank, config) for config in configs])
    for number, (variant, config) in enumerate(zip(variants, configs, strict=True)):
        shape, stage = plan(config), variant["zero_stage"]
        planned = memory_of_rank(shape, config, stage=stage, world_size=world_size, activations=None, logits=0)
        for rank in range(world_size):
            held = found[rank][number]
            assert {name: held[name] for name in ("weights", "gradients", "optimizer")} == {
                "weights": planned.weights,
                "gradients": planned.gradients,
                "optimizer": planned.optimizer,
            }, f"{variant} on {world_size} ranks"
        if "lora" not in variant:  # 30,000 adapters weigh less than what stands around them
            assert checkpoint_bytes(shape, config, stage=stage) == pytest.approx(
                found[0][number]["checkpoint"], rel=0.05
            )
    shutil.rmtree(tmp_path)


def test_seven_billion_parameters_by_hand(tmp_path: Path) -> None:
    shape = ModelShape(trained=((7_000_000_000,), (1_000,)), frozen=(), buffer_bytes=256, width=4096, vocabulary=32_000)
    config = make_config(tmp_path, tmp_path, precision="bf16")
    stage_1 = memory_of_rank(shape, config, stage=1, world_size=8, activations=10, logits=5)
    assert (stage_1.weights, stage_1.gradients) == (14_000_002_272, 42_000_006_048)  # 1,000 are padded to 1,008
    assert stage_1.optimizer == 7_000_001_008 * 12 // 8
    assert stage_1.total == stage_1.weights + stage_1.gradients + stage_1.optimizer + stage_1.working + 15
    stage_3 = memory_of_rank(shape, config, stage=3, world_size=8, activations=None, logits=0)
    assert stage_3.weights == (7_000_000_000 // 8 + 125 + 1_000) * 2 + 256  # the vector is whole on each rank, too
    assert stage_3.gradients == (875_000_000 + 125) * 4
    offloaded = memory_of_rank(
        shape, make_config(tmp_path, tmp_path, precision="bf16", offload=True), stage=3, world_size=8,
        activations=None, logits=0,
    )  # fmt: skip
    assert (offloaded.optimizer, offloaded.gradients, offloaded.host) == (0, 0, stage_3.optimizer + stage_3.gradients)
    assert checkpoint_bytes(shape, config, stage=3) == 7_000_001_000 * 12
    assert checkpoint_bytes(shape, config, stage=1) == 7_000_001_000 * 14
    assert logit_bytes(2048, 32_000, "bf16") == 2048 * 32_000 * 16
