"""ZeRO-3 on two ranks trains as one plain torch process does on the same global batches (Stoker's evidence for its loss).

Two rows in three have an image and an action, the third none of both but an answer of 1 to 12 words; some micro-batches
have no supervised token, others no image; so supervised tokens fall very unevenly on ranks and micro-batches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stoker_proto.config import ActionConfig, Config, ImageConfig, LoraConfig
from tests.trainer.support.memory import MemoryFeed, make_config, make_examples, make_processor
from tests.trainer.support.ranks import run_ranks
from trainer.build import build_engine, build_stepper
from trainer.checkpoints.export import gather_weights
from trainer.checkpoints.save import Checkpoints
from trainer.engine.optimizer import learning_rate, parameter_groups
from trainer.engine.zero import join_ranks, set_learning_rate
from trainer.feed.batch import IGNORED, MicroBatch
from trainer.models.families import family_of, read_model_config
from trainer.models.lora import add_adapters
from trainer.models.tiny import VLMS, build_tiny
from trainer.training.inputs import PixelNormaliser
from trainer.training.source_table import SourceTable
from trainer.training.step import StepResult

STEPS = 10
pytestmark = pytest.mark.process
Figures = list[tuple[float, float]]
Weights = dict[str, np.ndarray[Any, Any]]


def global_batches(config: Config, rank: int, world_size: int) -> list[list[MicroBatch]]:
    """Micro-batches of each step of one rank; in every second step the second global micro-batch has no labels."""
    processor = make_processor(config)
    feed = MemoryFeed(make_examples(STEPS * 8 - 3, seed=1), config, processor, rank, world_size)
    steps = [step.micro_batches for step in feed.steps(0, 0)]
    for number, batches in enumerate(steps):
        for index, batch in enumerate(batches):
            if number % 2 == 0 and index * world_size + rank == 1:
                batch.labels[:] = IGNORED
                batch.num_supervised = 0
    return steps


def train_zero(rank: int, config: Config) -> tuple[list[StepResult], Weights]:
    ranks = join_ranks()
    processor = make_processor(config)
    engine = build_engine(config, ranks, processor, Checkpoints(config, ranks), None)
    stepper = build_stepper(engine, config, processor, ranks, SourceTable(("memory",), (0,), (1,)))
    assert engine.module.training, "in evaluation mode neither dropout nor gradient checkpointing would be on"
    results = []
    for number, batches in enumerate(global_batches(config, rank, ranks.world_size)):
        set_learning_rate(engine, learning_rate(config.trainer, number, STEPS))
        results.append(stepper.step(batches, number))
    return results, {name: tensor.float().numpy() for name, tensor in gather_weights(engine).items()}


def train_plain(config: Config) -> tuple[Figures, Weights]:
    """No DeepSpeed, no ranks, full logits, the mean over all supervised tokens of the global batch, rows one by one."""
    family, processor = family_of(read_model_config(config.model.base_model_path)), make_processor(config)
    model = family.auto_class.from_pretrained(config.model.base_model_path, dtype=torch.float32)
    old_size = model.get_input_embeddings().num_embeddings
    if config.model.lora is not None:
        add_adapters(model, config.model.lora, config.trainer.seed)
    else:
        assert processor.vocab_size_needed > old_size, "the embeddings have to grow"
        model.resize_token_embeddings(processor.vocab_size_needed, mean_resizing=False)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight.data[old_size:] = layer.weight.data[:old_size].mean(dim=0)
    trainer = config.trainer
    groups = parameter_groups(model, trainer.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=trainer.lr, betas=trainer.betas)
    assert processor.image is not None
    normalise = PixelNormaliser(processor.image, torch.device("cpu"), torch.float32)
    figures = []
    for number, batches in enumerate(global_batches(config, 0, 1)):
        total = sum(batch.num_supervised for batch in batches)
        nll_total, correct = 0.0, 0
        for batch in batches:
            first_image = 0
            for row in range(batch.num_rows):
                length = int(batch.attention_mask[row].sum())
                pixels = None
                if batch.pixels is not None and batch.image_counts[row]:
                    pixels = batch.pixels[first_image : first_image + batch.image_counts[row]]
                first_image += batch.image_counts[row]
                labels = torch.from_numpy(batch.labels[row, :length])
                if (labels == IGNORED).all():
                    continue
                extra: dict[str, Any] = {}
                if pixels is not None and family.layout is not None:
                    extra = family.layout(normalise(torch.from_numpy(pixels)))
                if family.marks is not None:
                    first = torch.tensor([int((labels != IGNORED).int().argmax())])
                    ids = torch.from_numpy(batch.input_ids[row : row + 1, :length])
                    extra |= family.marks(ids, first, processor.image.token_id)
                logits = model(input_ids=torch.from_numpy(batch.input_ids[row : row + 1, :length]), **extra).logits[0]
                mask = labels[1:] != IGNORED
                predicted, wanted = logits[:-1][mask], labels[1:][mask]
                nll = -torch.log_softmax(predicted, dim=-1)[torch.arange(len(wanted)), wanted].sum()
                torch.autograd.backward(nll / total)
                nll_total += nll.item()
                correct += int((predicted.argmax(-1) == wanted).sum())
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(trainer, number, STEPS)
        optimizer.step()
        optimizer.zero_grad()
        figures.append((nll_total / total, correct / total))
    return figures, {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "family",
    [
        *("llava", "openvla"),
        *(pytest.param(family, marks=pytest.mark.slow) for family in ("llava with adapters", "idefics3", *VLMS)),
    ],
)
def test_two_zero3_ranks_train_as_one_plain_process(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if family in VLMS:
        model = tmp_path / "model"
        build_tiny(family, model)
    else:
        model = request.getfixturevalue(f"tiny_{family.split()[0]}")
    action = ActionConfig(codec="bins", vocabulary="added", codec_options={"num_bins": 128})
    more: dict[str, Any] = {}
    if "adapters" in family:
        action, more = ActionConfig(codec="bins"), {"lora": LoraConfig(rank=8, alpha=16), "lr": 1e-2}
    image = ImageConfig(transport="pixels", size=(64, 64) if family.startswith("qwen") else None)
    config = make_config(
        model, tmp_path, data={"action": action, "image": image}, weight_decay=0.1, gradient_checkpointing=True, **more
    )
    expected, weights = train_plain(config)
    (results, found), (others, _) = run_ranks(2, lambda rank: train_zero(rank, config))
    assert [(r.loss, r.accuracy, r.grad_norm) for r in results] == [(r.loss, r.accuracy, r.grad_norm) for r in others]
    assert len(results) == STEPS
    assert results[-1].loss < results[0].loss - 0.5, "it learns"
    for number, (result, (loss, accuracy)) in enumerate(zip(results, expected, strict=True)):
        assert result.applied
        assert result.loss == pytest.approx(loss, abs=1e-5), f"step {number}"
        assert result.accuracy == pytest.approx(accuracy, abs=1e-12), f"step {number}"
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_allclose(found[name], value, atol=1e-4, err_msg=name)
