"""The loss in chunks is the loss of all logits at once: values, gradients, every family, ZeRO-3, and how much memory it takes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from stoker_proto.config import ActionConfig, Config, ImageConfig, LoraConfig, LossConfig
from stoker_proto.processor import Processor
from tests.trainer.support.memory import MemoryFeed, make_config, make_examples, make_processor
from tests.trainer.support.ranks import run_ranks
from tests.trainer.training.test_packed import CPU, ONE_SOURCE, SMALL, PlainEngine, text_model
from trainer.build import build_engine, build_stepper
from trainer.checkpoints.export import gather_weights
from trainer.checkpoints.save import Checkpoints
from trainer.engine.optimizer import learning_rate
from trainer.engine.ranks import Ranks
from trainer.engine.zero import join_ranks, set_learning_rate
from trainer.feed.batch import MicroBatch
from trainer.losses.registry import make_loss
from trainer.models.families import family_of, read_model_config
from trainer.models.lora import add_adapters
from trainer.models.tiny import VLMS, build_tiny
from trainer.training.chunk_check import prove_chunks
from trainer.training.chunks import capped, divided, multiplied, unchanged
from trainer.training.inputs import InputMaker
from trainer.training.objective import Objective
from trainer.training.step import Stepper

SIZE = 3
IN_CHUNKS = LossConfig(chunk_labels=SIZE)
GEMMA = {**SMALL, "head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0}
TEXT: dict[str, tuple[str, dict[str, Any], Callable[..., Any]]] = {
    "untied": ("llama", {**SMALL, "tie_word_embeddings": False}, unchanged),
    "tied": ("llama", {**SMALL, "tie_word_embeddings": True}, unchanged),
    "gemma2": ("gemma2", GEMMA, capped),
    "cohere": ("cohere", {**SMALL, "logit_scale": 0.25}, multiplied),
    "granite": ("granite", {**SMALL, "logits_scaling": 4.0}, divided),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "attn_pdrop": 0, "embd_pdrop": 0,
                      "resid_pdrop": 0}, unchanged),
}  # fmt: skip


def batch_of(config: Config, processor: Processor, *, images: bool) -> MicroBatch:
    """A row of an action with an image, if there are images, and one of words."""
    return MemoryFeed(make_examples(8, seed=4, images=images), config, processor, 0, 1).batch(0, 0, 2)


def stepper_of(model: torch.nn.Module, processor: Processor, objective: Objective | None = None) -> Stepper:
    make_inputs = InputMaker(processor, family_of(model.config), CPU, torch.float32)  # type: ignore[arg-type]
    ranks = Ranks(rank=0, world_size=1, local_rank=0, device=CPU)
    return Stepper(PlainEngine(model), make_inputs, ranks, 0, ONE_SOURCE, objective)


def learn(stepper: Stepper, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    model = stepper.engine.module
    model.zero_grad()
    minimised, rows = stepper.losses(stepper.make_inputs(batch))
    (minimised.sum() / 7).backward()  # type: ignore[no-untyped-call]
    return minimised.detach(), rows, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_equal(stepper: Stepper, batch: MicroBatch, config: Config) -> None:
    """With chunks as without, within 1e-6 (of gradients: of the largest, where that is above 1)."""
    stepper.chunks = None
    minimised, rows, gradients = learn(stepper, batch)
    stepper.chunks = prove_chunks(stepper, stepper.make_inputs.processor, config)
    assert stepper.chunks is not None
    calls: list[torch.Size] = []
    hook = stepper.chunks.head.register_forward_hook(lambda module, given, output: calls.append(output.shape))
    found = learn(stepper, batch)
    hook.remove()
    assert batch.num_supervised > 2 * SIZE
    assert calls == [(1, batch.num_supervised, 1)], "the head gives losses, not logits"
    torch.testing.assert_close(found[0], minimised, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found[1], rows, atol=1e-6, rtol=1e-6)
    assert found[2].keys() == gradients.keys()
    for name, gradient in gradients.items():
        close = {"atol": 1e-6 * max(1.0, float(gradient.abs().max())), "rtol": 0}
        torch.testing.assert_close(found[2][name], gradient, **close, msg=lambda text, name=name: f"{name}: {text}")
    with torch.no_grad():
        assert stepper.logits(stepper.make_inputs(batch)).shape[2] > 100, "the head is as it was"


@pytest.mark.long
@pytest.mark.parametrize("kind", TEXT)
def test_text_models(kind: str, tiny_causal: Path, tmp_path: Path) -> None:
    config = make_config(tiny_causal, tmp_path, loss=IN_CHUNKS)
    processor = make_processor(config)
    name, options, finish = TEXT[kind]
    stepper = stepper_of(text_model(name, processor, **options).train(), processor)
    check_equal(stepper, batch_of(config, processor, images=False), config)
    assert stepper.chunks is not None
    assert stepper.chunks.finish.__qualname__.partition(".")[0] == finish.__name__


QUICK = ("llava", "openvla", "paligemma", "qwen3_vl")


@pytest.mark.long
@pytest.mark.parametrize(
    "family",
    [*QUICK, *(pytest.param(f, marks=pytest.mark.slow) for f in ("idefics3", *VLMS) if f not in QUICK)],
)
def test_models_that_see_images(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if family in VLMS:
        folder = tmp_path / "model"
        build_tiny(family, folder)
    else:
        folder = request.getfixturevalue(f"tiny_{family}")
    image = ImageConfig(transport="pixels", size=(64, 64) if family.startswith("qwen") else None)
    config = make_config(folder, tmp_path, data={"image": image}, loss=IN_CHUNKS)
    processor = make_processor(config)
    model = family_of(read_model_config(str(folder))).auto_class.from_pretrained(folder, dtype=torch.float32).train()
    model.resize_token_embeddings(max(processor.vocab_size_needed, 1025), mean_resizing=False)
    for images in (True, False):  # without: the head's input has a row more, of the black image
        check_equal(stepper_of(model, processor), batch_of(config, processor, images=images), config)


@pytest.mark.long
def test_adapters_on_the_head_and_soft_targets(tiny_causal: Path, tmp_path: Path) -> None:
    config = make_config(tiny_causal, tmp_path, loss=LossConfig(type="ordinal", chunk_labels=SIZE))
    processor = make_processor(config)
    model = text_model("llama", processor, **SMALL, tie_word_embeddings=False)
    add_adapters(model, LoraConfig(rank=2, alpha=4.0, targets=("lm_head", "q_proj")), 0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    assert processor.vocabulary is not None
    batch = batch_of(config, processor, images=False)
    batch.labels[:, 10:14] = processor.vocabulary.first_id + 2  # action tokens: soft targets
    batch.num_supervised = int((batch.labels[:, 1:] != -100).sum())
    objective = Objective(make_loss(config.trainer.loss, processor))
    check_equal(stepper_of(model.train(), processor, objective), batch, config)


class Strange(torch.nn.Module):
    """A model with something unknown behind its head."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()  # type: ignore[operator]

    def forward(self, input_ids: Any, attention_mask: Any = None, use_cache: bool = False) -> Any:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask)
        output.logits = output.logits.abs().sqrt()
        return output


class OfTheWholeRow:
    """A loss that does not say `per_label`."""

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return logits[..., 0] * (targets != -100)


def test_what_cannot_be_done_in_chunks_is_done_at_once_and_said(
    tiny_causal: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tiny_causal, tmp_path, loss=IN_CHUNKS)
    processor = make_processor(config)
    model = text_model("llama", processor, **SMALL)
    headless = text_model("llama", processor, **SMALL)
    headless.get_output_embeddings = lambda: None  # type: ignore[assignment]
    refused = {
        "does something unknown to its head's output": stepper_of(Strange(model), processor),
        "its head is none of its own": stepper_of(headless, processor),
        "OfTheWholeRow does not say `per_label = True`": stepper_of(model, processor, Objective(OfTheWholeRow())),
    }
    with caplog.at_level(logging.WARNING):
        for reason, stepper in refused.items():
            caplog.clear()
            assert prove_chunks(stepper, processor, config) is None
            assert reason in caplog.text
    caplog.clear()
    for size in (0, 2 * 96):  # never, and as many as two rows of data.max_seq_len can have
        chosen = replace(config, trainer=replace(config.trainer, loss=LossConfig(chunk_labels=size)))
        assert prove_chunks(stepper_of(model, processor), processor, chosen) is None
    assert caplog.text == ""


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors, made inside, that were alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive.setdefault(StorageWeakRef(storage), storage.nbytes())
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


@pytest.mark.long
def test_memory_is_that_of_one_chunk(tiny_causal: Path, tmp_path: Path) -> None:
    """160 labels of a vocabulary of 20,000: 12.8 MB of float32. At once it takes three such; in chunks of 16 less than one.

    The gradient of the head (20,000 x 32 numbers, 2.56 MB) is in both, in chunks twice (one chunk's, and the sum).
    """
    config = make_config(tiny_causal, tmp_path, loss=LossConfig(chunk_labels=16))
    processor = make_processor(config)
    model = text_model("llama", processor, **{**SMALL, "tie_word_embeddings": False, "vocab_size": 20_000}).train()
    batch = batch_of(config, processor, images=False)
    batch.labels = batch.input_ids[:, :1].repeat(81, axis=1)
    batch.input_ids, batch.attention_mask = batch.labels.copy(), batch.labels * 0 + 1
    peaks = []
    for size in (0, 16):
        chosen = replace(config, trainer=replace(config.trainer, loss=LossConfig(chunk_labels=size)))
        stepper = stepper_of(model, processor)
        stepper.chunks = prove_chunks(stepper, processor, chosen)
        model.zero_grad()
        inputs = stepper.make_inputs(batch)
        assert inputs.num_labels == 160
        with LiveBytes() as live:
            minimised, _ = stepper.losses(inputs)
            minimised.sum().backward()  # type: ignore[no-untyped-call]
        peaks.append(live.peak / 1e6)
    whole, chunk = 12.8, 1.28
    assert peaks[0] > 3 * whole
    assert peaks[1] < 4 * chunk + 3 * 2.56 + 1.0
    print(f"peak of loss and gradient: {peaks[0]:.1f} MB at once, {peaks[1]:.1f} MB in chunks of 16 labels")


def train_zero(rank: int, configs: dict[str, Config]) -> dict[str, tuple[list[float], dict[str, Any]]]:
    """Losses and weights after 3 steps of 2 micro-batches, for each config one engine after the other."""
    ranks, found = join_ranks(), {}
    for name, config in configs.items():
        processor = make_processor(config)
        engine = build_engine(config, ranks, processor, Checkpoints(config, ranks), None)
        stepper = build_stepper(engine, config, processor, ranks, ONE_SOURCE)
        assert (stepper.chunks is not None) == (config.trainer.loss.chunk_labels > 0)
        feed = MemoryFeed(make_examples(24, seed=1), config, processor, rank, ranks.world_size)
        losses = []
        for step in feed.steps(0, 0):
            set_learning_rate(engine, learning_rate(config.trainer, step.step, 3))
            losses.append(stepper.step(step.micro_batches, step.step).loss)
        found[name] = losses, {key: value.float().numpy().copy() for key, value in gather_weights(engine).items()}
        engine.destroy()
    return found


@pytest.mark.process
@pytest.mark.parametrize(
    "kind", ["adapters on the head", *(pytest.param(k, marks=pytest.mark.slow) for k in ("llava", "tied"))]
)
def test_two_zero3_ranks_train_in_chunks_as_at_once(kind: str, tiny_llava: Path, tmp_path: Path) -> None:
    """Some micro-batches have few labels and take no chunks, on one rank and not on the other: nobody hangs."""
    action = ActionConfig(codec="bins", vocabulary="added", codec_options={"num_bins": 128})
    folder, more = tiny_llava, dict[str, Any]()
    if kind == "tied":
        folder = tmp_path / "paligemma"
        build_tiny("paligemma", folder)
    if kind == "adapters on the head":
        action, more = ActionConfig(codec="bins"), {"lora": LoraConfig(rank=4, alpha=8, targets=("lm_head", "q_proj"))}
        more |= {"lr": 3e-2}
    data = {"action": action}
    configs = {
        str(size): make_config(
            folder,
            tmp_path / str(size),
            data=data,
            loss=LossConfig(chunk_labels=size),
            gradient_checkpointing=True,
            **more,
        )
        for size in (0, 7)
    }
    found, _ = run_ranks(2, lambda rank: train_zero(rank, configs))
    (losses, weights), (chunked, others) = found["0"], found["7"]
    assert losses[-1] < losses[0] - 0.1
    assert chunked == pytest.approx(losses, abs=1e-6)
    for name, weight in weights.items():
        np.testing.assert_allclose(others[name], weight, atol=2e-5, err_msg=name)
