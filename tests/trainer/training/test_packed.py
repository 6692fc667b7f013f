"""Samples packed into a row are trained as if each were alone: losses, gradients, and a run under ZeRO-3."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from stoker_proto.config import Config
from stoker_proto.errors import ConfigError
from stoker_proto.processor import Processor
from stoker_proto.wire.messages import Piece
from tests.trainer.support.memory import make_config, make_examples, make_piece, make_processor
from tests.trainer.support.ranks import run_ranks
from trainer.build import build_engine, build_stepper
from trainer.checkpoints.export import gather_weights
from trainer.checkpoints.save import Checkpoints
from trainer.engine.optimizer import learning_rate, parameter_groups
from trainer.engine.ranks import Ranks
from trainer.engine.zero import join_ranks, set_learning_rate
from trainer.feed.batch import IGNORED, BatchBuilder, MicroBatch
from trainer.models.families import check_forward, family_of, read_model_config
from trainer.training.inputs import InputMaker
from trainer.training.packed import check_packing
from trainer.training.source_table import SourceTable
from trainer.training.step import Stepper

ONE_SOURCE = SourceTable(("memory",), (0,), (1,))
CPU = torch.device("cpu")
STEPS = 4
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen2": SMALL,
    "qwen3": {**SMALL, "head_dim": 8},
    "smollm3": {**SMALL, "pad_token_id": 0},
    "mistral": {**SMALL, "sliding_window": 6},
    "gemma3_text": {**SMALL, "head_dim": 8, "sliding_window": 6},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0},
}  # fmt: skip
LEAKING: dict[str, dict[str, Any]] = {
    "opt": {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
}  # fmt: skip


def nll_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Over all labels."""
    flat = logits.flatten(0, 1), targets.flatten()
    return torch.nn.functional.cross_entropy(*flat, ignore_index=IGNORED, reduction="sum")


class PlainEngine(torch.nn.Module):
    """What a Stepper needs of an engine."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **arguments: Any) -> Any:
        return self.module(**arguments)


def text_model(kind: str, processor: Processor, **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": processor.end_id, "vocab_size": processor.vocab_size_needed}
    config = transformers.AutoConfig.for_model(kind, **{**ids, **options})
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def stepper_of(model: torch.nn.Module, processor: Processor) -> Stepper:
    make_inputs = InputMaker(processor, family_of(model.config), CPU, torch.float32)  # type: ignore[arg-type]
    return Stepper(
        PlainEngine(model), make_inputs, Ranks(rank=0, world_size=1, local_rank=0, device=CPU), 0, ONE_SOURCE
    )


def pack(piece: Piece, row_samples: list[int]) -> Piece:
    """The piece's samples in rows of so many; of each sample all tokens are labels, as in plain text."""
    everything = np.ones_like(piece.supervised)
    return replace(piece, supervised=everything, row_samples=np.array(row_samples, np.uint16))


def text_piece(processor: Processor, count: int, seed: int = 1) -> Piece:
    return make_piece(make_examples(count, seed=seed, images=False), list(range(count)), processor)


def batch_of(piece: Piece, rows: int, processor: Processor, *, packing: bool) -> MicroBatch:
    return BatchBuilder(decoder=processor, num_rows=rows, max_tokens=400, packing=packing)([piece])


def sample_losses(stepper: Stepper, batch: MicroBatch, lengths: list[list[int]]) -> list[float]:
    """Mean NLL of each sample's tokens, rows of samples of `lengths`."""
    inputs = stepper.make_inputs(batch)
    logits = stepper.logits(inputs)
    full = torch.zeros(batch.input_ids.shape)
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), inputs.targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    full[:, inputs.positions] = losses.view_as(inputs.targets)
    return [
        float(part.sum()) / (len(part) - 1)
        for row, sizes in zip(full.detach(), lengths, strict=False)
        for part in row[: sum(sizes)].split(sizes)
    ]


def gradients(stepper: Stepper, batches: list[MicroBatch]) -> dict[str, torch.Tensor]:
    model = stepper.engine.module
    model.zero_grad()
    for batch in batches:
        inputs = stepper.make_inputs(batch)
        nll_sum(stepper.logits(inputs), inputs.targets).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_equal(model: torch.nn.Module, processor: Processor) -> None:
    """Seven samples in rows of 3, 1 and 3 lose (per token) and learn what they do in rows of their own, and alone."""
    stepper = stepper_of(model, processor)
    packed = pack(text_piece(processor, 7), [3, 1, 3])
    sizes = packed.lengths.tolist()
    together = batch_of(packed, 4, processor, packing=True)  # one padding row
    plain = batch_of(replace(packed, row_samples=np.zeros(0, np.uint16)), 7, processor, packing=False)
    assert together.num_supervised == plain.num_supervised == sum(sizes) - 7
    found = sample_losses(stepper, together, [sizes[:3], sizes[3:4], sizes[4:]])
    assert found == pytest.approx(sample_losses(stepper, plain, [[size] for size in sizes]), abs=1e-5)
    for number, loss in enumerate(found):  # the model as it is, without anything of ours
        start = sum(sizes[:number])
        ids = torch.from_numpy(packed.input_ids[start : start + sizes[number]].astype(np.int64))[None]
        logits = model(input_ids=ids).logits[0, :-1]
        assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).detach()), abs=1e-5)
    expected, learned = gradients(stepper, [plain]), gradients(stepper, [together])
    assert expected.keys() == learned.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(learned[name], gradient, atol=1e-5 * max(1.0, float(gradient.abs().max())), rtol=0)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_model_loses_and_learns_as_if_each_sample_were_alone(
    kind: str, tiny_causal: Path, tmp_path: Path
) -> None:
    processor = make_processor(make_config(tiny_causal, tmp_path))
    model = text_model(kind, processor, **KINDS[kind])
    check_equal(model, processor)
    check_packing(stepper_of(model, processor), processor)


@pytest.mark.long
@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_so_does_the_language_model_of_a_model_that_sees_images(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(f"tiny_{family}")
    processor = make_processor(make_config(folder, tmp_path))
    loaded = family_of(read_model_config(str(folder))).auto_class.from_pretrained(folder).float().eval()
    check_equal(loaded, processor)
    check_packing(stepper_of(loaded, processor), processor)


@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_rows_with_images_may_stand_beside_packed_ones(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(f"tiny_{family}")
    processor = make_processor(make_config(folder, tmp_path))
    model = family_of(read_model_config(str(folder))).auto_class.from_pretrained(folder).float().eval()
    stepper = stepper_of(model, processor)
    robots = make_piece(make_examples(2, seed=5), [0, 1], processor)
    chats = text_piece(processor, 4)
    build = {
        packing: BatchBuilder(decoder=processor, num_rows=6, max_tokens=400, packing=packing)
        for packing in (True, False)
    }
    together = build[True]([robots, replace(chats, row_samples=np.array([3, 1], np.uint16))])
    plain = build[False]([robots, chats])
    assert together.actions[:2].tolist() == plain.actions[:2].tolist()
    assert np.isnan(together.actions[2:]).all()
    assert (together.num_rows, plain.num_rows) == (4, 6)
    assert together.num_supervised == plain.num_supervised
    losses = []
    for batch in (together, plain):
        inputs = stepper.make_inputs(batch)
        losses.append(float(nll_sum(stepper.logits(inputs), inputs.targets).detach()) / batch.num_supervised)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_the_dummy_image_and_padding_are_sequences_of_their_own(tiny_llava: Path, tmp_path: Path) -> None:
    processor = make_processor(make_config(tiny_llava, tmp_path))
    family = family_of(read_model_config(str(tiny_llava)))
    ids = np.array([5, 6, 7, 8, 9], np.int32)
    piece = pack(replace(text_piece(processor, 2), lengths=np.array([3, 2], np.int32), input_ids=ids,
                         supervised=np.ones(5, np.uint8)), [2])  # fmt: skip
    inputs = InputMaker(processor, family, CPU, torch.float32)(batch_of(piece, 1, processor, packing=True))
    assert "attention_mask" not in inputs.arguments
    assert inputs.arguments["position_ids"].tolist() == [
        [0, 1, 2, 0, 1, *[0] * 11],  # the image is longer than the row
        list(range(16)),
    ]


@pytest.mark.parametrize("kind", LEAKING)
def test_a_model_that_attends_across_samples_is_refused(kind: str, tiny_causal: Path, tmp_path: Path) -> None:
    processor = make_processor(make_config(tiny_causal, tmp_path))
    model = text_model(kind, processor, **LEAKING[kind])
    with pytest.raises(ConfigError, match="does not keep the samples of a packed row apart"):
        check_packing(stepper_of(model, processor), processor)


def test_a_model_that_takes_no_positions_is_refused(tiny_causal: Path, tmp_path: Path) -> None:
    processor = make_processor(make_config(tiny_causal, tmp_path))
    model = text_model("bloom", processor, hidden_size=32, n_layer=1, n_head=4)
    family = family_of(model.config)  # type: ignore[arg-type]
    check_forward(model, family, packing=False)
    with pytest.raises(ConfigError, match="BloomForCausalLM: its forward takes no `position_ids`"):
        check_forward(model, family, packing=True)


def packed_steps(config: Config, rank: int, world_size: int) -> list[list[MicroBatch]]:
    """Of each step two micro-batches of 2 rows of 3 samples each on this rank; 4 x 2 x 3 samples on two ranks together."""
    processor = make_processor(config)
    steps = []
    for step in range(STEPS):
        micro = []
        for index in range(4 // world_size):
            number = step * 4 + index * world_size + rank
            micro.append(batch_of(pack(text_piece(processor, 6, seed=number), [3, 3]), 2, processor, packing=True))
        steps.append(micro)
    return steps


def train_zero(rank: int, config: Config) -> Any:
    ranks = join_ranks()
    processor = make_processor(config)
    engine = build_engine(config, ranks, processor, Checkpoints(config, ranks), None)
    stepper = build_stepper(engine, config, processor, ranks, ONE_SOURCE)
    results = []
    for number, batches in enumerate(packed_steps(config, rank, ranks.world_size)):
        set_learning_rate(engine, learning_rate(config.trainer, number, STEPS))
        results.append(stepper.step(batches, number))
    return results, {name: tensor.float().numpy() for name, tensor in gather_weights(engine).items()}


def train_plain(config: Config) -> Any:
    """(loss of each step, weights): transformers and torch.optim, one sample at a time and never a packed row."""
    processor = make_processor(config)
    model = transformers.AutoModelForCausalLM.from_pretrained(config.model.base_model_path).float().train()
    model.resize_token_embeddings(max(processor.vocab_size_needed, model.config.vocab_size), mean_resizing=False)
    trainer = config.trainer
    optimizer = torch.optim.AdamW(parameter_groups(model, trainer.weight_decay), lr=trainer.lr, betas=trainer.betas)
    losses = []
    for number in range(STEPS):
        pieces = [text_piece(processor, 6, seed=number * 4 + index) for index in range(4)]
        total = sum(int((piece.lengths - 1).sum()) for piece in pieces)
        loss = 0.0
        for piece in pieces:
            for ids in torch.from_numpy(piece.input_ids.astype(np.int64)).split(piece.lengths.tolist()):
                nll = torch.nn.functional.cross_entropy(
                    model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="sum"
                )
                (nll / total).backward()
                loss += nll.item() / total
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(trainer, number, STEPS)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses, {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.process
def test_two_zero3_ranks_train_packed_rows_as_one_process_trains_the_samples(tiny_causal: Path, tmp_path: Path) -> None:
    config = make_config(tiny_causal, tmp_path, data={"packing": True}, weight_decay=0.1, gradient_checkpointing=True)
    losses, weights = train_plain(config)
    (results, found), _ = run_ranks(2, lambda rank: train_zero(rank, config))
    assert [result.loss for result in results] == pytest.approx(losses, abs=1e-5)
    assert [result.num_rows for result in results] == [8] * STEPS
    assert losses[-1] < losses[0] - 0.5
    for name, value in weights.items():
        np.testing.assert_allclose(found[name], value, atol=1e-4, err_msg=name)
