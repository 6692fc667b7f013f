"""Which masks attention gets: none for padding that nobody sees, and none for packed rows with flash attention.

Flash attention itself needs a GPU and the package flash-attn. Here its two functions are replaced by ones of the same meaning in
plain torch, below transformers' own code that calls them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from torch.utils._python_dispatch import TorchDispatchMode

from stoker_proto.config import ImageConfig
from stoker_proto.errors import ConfigError
from stoker_proto.processor import Processor
from tests.trainer.support.memory import make_config, make_examples, make_piece, make_processor
from tests.trainer.training.test_chunks import IN_CHUNKS, batch_of, learn
from tests.trainer.training.test_packed import CPU, KINDS, pack, stepper_of, text_model, text_piece
from tests.trainer.training.test_packed import batch_of as packed_batch_of
from trainer.feed.batch import BatchBuilder
from trainer.models.families import family_of, read_model_config
from trainer.models.tiny import VLMS, build_tiny
from trainer.training.chunk_check import prove_chunks
from trainer.training.inputs import InputMaker, in_one_row
from trainer.training.mask_check import needs_no_mask, refuse_seeing_ahead
from trainer.training.packed import check_packing, wants_one_row
from trainer.training.step import Stepper

SEES_PADDING = ("paligemma", "qwen2_5_vl", "qwen3_vl")
"""PaliGemma's prefix sees all of itself, padding too; Qwen-VL counts positions from the mask."""


def check_no_mask(stepper: Stepper, batch: Any) -> None:
    """Losses, correct labels and gradients are the same without a mask, within rounding."""
    learned = {}
    for masks in (True, False):
        stepper.make_inputs.masks = masks
        assert ("attention_mask" in stepper.make_inputs(batch).arguments) == masks
        learned[masks] = learn(stepper, batch)
    assert (batch.attention_mask.sum(axis=1) < batch.attention_mask.shape[1]).any(), "there is padding"
    torch.testing.assert_close(learned[False][0], learned[True][0], atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(learned[False][1], learned[True][1], atol=1e-5, rtol=1e-6)
    assert learned[False][2].keys() == learned[True][2].keys()
    for name, gradient in learned[True][2].items():
        close = {"atol": 2e-6 * max(1.0, float(gradient.abs().max())), "rtol": 0}
        torch.testing.assert_close(learned[False][2][name], gradient, **close)


@pytest.mark.long
@pytest.mark.parametrize("kind", [*KINDS, "opt"])
def test_padding_of_a_text_model_needs_no_mask(kind: str, tiny_causal: Path, tmp_path: Path) -> None:
    config = make_config(tiny_causal, tmp_path)
    processor = make_processor(config)
    options = KINDS.get(kind) or {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                                  "word_embed_proj_dim": 32, "dropout": 0.0}  # fmt: skip
    stepper = stepper_of(text_model(kind, processor, **options).train(), processor)
    assert needs_no_mask(stepper, processor)
    refuse_seeing_ahead(stepper, processor)
    check_no_mask(stepper, batch_of(config, processor, images=False))


BERT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("kind", ["bert", "gemma3_text"])
def test_a_model_that_sees_later_tokens_is_refused(kind: str, tiny_causal: Path, tmp_path: Path) -> None:
    """It would read the tokens that it should predict: its loss falls, and it can generate nothing."""
    processor = make_processor(make_config(tiny_causal, tmp_path))
    ahead, causal = (
        ({**BERT, "is_decoder": False}, {**BERT, "is_decoder": True})
        if kind == "bert"
        else ({**KINDS[kind], "use_bidirectional_attention": True}, KINDS[kind])
    )
    refuse_seeing_ahead(stepper_of(text_model(kind, processor, **causal), processor), processor)
    with pytest.raises(ConfigError, match=r"lets tokens see later ones: its logits change by \S+ of their standard"):
        refuse_seeing_ahead(stepper_of(text_model(kind, processor, **ahead), processor), processor)


QUICK = ("llava", "openvla", "paligemma")


@pytest.mark.long
@pytest.mark.parametrize(
    "family",
    [*QUICK, *(pytest.param(f, marks=pytest.mark.slow) for f in ("idefics3", *VLMS) if f not in QUICK)],
)
def test_nor_does_that_of_a_causal_model_that_sees_images(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if family in VLMS:
        folder = tmp_path / "model"
        build_tiny(family, folder)
    else:
        folder = request.getfixturevalue(f"tiny_{family}")
    image = ImageConfig(transport="pixels", size=(64, 64) if family.startswith("qwen") else None)
    config = make_config(folder, tmp_path, data={"image": image})
    processor = make_processor(config)
    model = family_of(read_model_config(str(folder))).auto_class.from_pretrained(folder, dtype=torch.float32).train()
    model.resize_token_embeddings(max(processor.vocab_size_needed, 1025), mean_resizing=False)
    stepper = stepper_of(model, processor)
    assert needs_no_mask(stepper, processor) == (family not in SEES_PADDING)
    refuse_seeing_ahead(stepper, processor)  # PaliGemma's is meant to see its prefix
    if family not in SEES_PADDING:
        for images in (True, False):
            check_no_mask(stepper, batch_of(config, processor, images=images))


def test_a_text_model_that_sees_its_padding_keeps_the_mask(
    tiny_causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = make_processor(make_config(tiny_causal, tmp_path))
    model = text_model("llama", processor, **KINDS["llama"])
    forward = model.forward

    def averaged(input_ids: Any, attention_mask: Any = None, **others: Any) -> Any:
        """Each token's logits know the mean token of its row."""
        output = forward(input_ids=input_ids, attention_mask=attention_mask, **others)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mean = (input_ids * mask).sum(dim=1) / mask.sum(dim=1)
        output.logits = output.logits + 1e-3 * mean[:, None, None]
        return output

    monkeypatch.setattr(model, "forward", averaged)
    assert not needs_no_mask(stepper_of(model, processor), processor)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Causal attention of one sequence: q [T, heads, D]; k, v [T, fewer heads, D]."""
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return mixed[0].transpose(0, 1)


def flash_attn_func(
    q: Any, k: Any, v: Any, softmax_scale: Any = None, causal: bool = False, dropout_p: float = 0.0
) -> Any:
    if not causal:  # a vision tower's
        parts = (part.transpose(1, 2) for part in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*parts, scale=softmax_scale).transpose(1, 2)
    return torch.stack([attend(*row, softmax_scale) for row in zip(q, k, v, strict=True)])


CALLS: list[tuple[list[int], int]] = []
"""(cumulative lengths, longest) of each call of the function for sequences of different lengths."""


def flash_attn_varlen_func(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any,
    softmax_scale: Any = None, causal: bool = False, dropout_p: float = 0.0,
) -> Any:  # fmt: skip
    assert causal
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    ends = cu_seqlens_q.tolist()
    assert ends == cu_seqlens_k.tolist()
    CALLS.append((ends, int(max_seqlen_q)))
    return torch.cat([attend(q[a:b], k[a:b], v[a:b], softmax_scale) for a, b in pairwise(ends)])


@pytest.fixture
def flash_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers finds the functions above where it looks for those of the package."""
    found = (flash_attn_func, flash_attn_varlen_func, None, flash._pad_input, flash._unpad_input)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *arguments, **options: found)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    CALLS.clear()
    yield
    CALLS.clear()


class Square(TorchDispatchMode):
    """Notes tensors [..., T, T] of one length: masks and matrices of attention."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.found = length, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape[-2:] == (self.length, self.length):
            self.found += 1
        return out


def in_flash(model: Any, processor: Any) -> Stepper:
    model.config._attn_implementation = "flash_attention_2"
    stepper = stepper_of(model, processor)
    stepper.make_inputs.in_one_row = True
    return stepper


@pytest.mark.usefixtures("flash_attention")
@pytest.mark.parametrize("chunked", [False, True])
def test_packed_rows_reach_flash_attention_as_one_row(chunked: bool, tiny_causal: Path, tmp_path: Path) -> None:
    config = make_config(tiny_causal, tmp_path, loss=IN_CHUNKS)
    processor = make_processor(config)
    model = text_model("llama", processor, **KINDS["llama"]).train()
    piece = pack(text_piece(processor, 7), [3, 1, 3])
    sizes = piece.lengths.tolist()
    batch = packed_batch_of(piece, 4, processor, packing=True)  # one padding row, of one token
    dense = stepper_of(model, processor)
    expected = learn(dense, batch)
    total = sum(sizes) + 1
    stepper = in_flash(model, processor)
    check_packing(stepper, processor)
    stepper.chunks = prove_chunks(stepper, processor, config) if chunked else None
    CALLS.clear()
    with Square(total) as square:
        found = learn(stepper, batch)
    assert {tuple(ends) for ends, _ in CALLS} == {(0, *np.cumsum([*sizes, 1]).tolist())}
    assert {longest for _, longest in CALLS} == {max(sizes)}
    assert len(CALLS) == 2, "once in each layer"
    assert square.found == 0
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-6)
    for name, gradient in expected[2].items():
        close = {"atol": 2e-6 * max(1.0, float(gradient.abs().max())), "rtol": 0}
        torch.testing.assert_close(found[2][name], gradient, **close)


@pytest.mark.long
@pytest.mark.usefixtures("flash_attention")
def test_so_do_those_beside_rows_with_images(tiny_llava: Path, tmp_path: Path) -> None:
    processor = make_processor(make_config(tiny_llava, tmp_path))
    model = family_of(read_model_config(str(tiny_llava))).auto_class.from_pretrained(tiny_llava, dtype=torch.float32)
    model.resize_token_embeddings(max(processor.vocab_size_needed, 1025), mean_resizing=False)
    build = BatchBuilder(decoder=processor, num_rows=6, max_tokens=400, packing=True)
    chats = replace(text_piece(processor, 4), row_samples=np.array([3, 1], np.uint16))
    batches = [build([make_piece(make_examples(2, seed=5), [0, 1], processor), chats]), build([chats])]
    plain = [learn(stepper_of(model.train(), processor), batch) for batch in batches]
    stepper = in_flash(model, processor)
    for batch, expected in zip(batches, plain, strict=True):  # without an image: the dummy's row is behind the others
        found = learn(stepper, batch)
        torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-6)
    assert CALLS, "the function for several sequences"


def test_one_row_by_hand() -> None:
    rows = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9, 0], [1, 2, 0, 0, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0]]),
    }
    found, longest = in_one_row(rows, np.array([0, 3, 4]), 2, with_lengths=True)
    assert found["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 2]]
    assert found["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert found["cu_seq_lens_q"].tolist() == found["cu_seq_lens_k"].tolist() == [0, 3, 5, 7]
    assert longest == 3
    assert found["grid"].tolist() == [0, 3, 4, 5, 6, 6], "positions 3 and 4 of the second row are behind its end"


@pytest.mark.usefixtures("flash_attention")
def test_packed_rows_that_are_rows_would_be_mixed_up_and_are_refused(tiny_causal: Path, tmp_path: Path) -> None:
    processor = make_processor(make_config(tiny_causal, tmp_path))
    stepper = in_flash(text_model("llama", processor, **KINDS["llama"]), processor)
    stepper.make_inputs.in_one_row = False
    with pytest.raises(ConfigError, match="does not keep the samples of a packed row apart"):
        check_packing(stepper, processor)


def test_one_row_is_for_flash_attention_and_not_for_actions(tiny_causal: Path, tmp_path: Path) -> None:
    processor = make_processor(make_config(tiny_causal, tmp_path))
    family = family_of(read_model_config(str(tiny_causal)))
    text = Processor.build(make_config(tiny_causal, tmp_path), None)
    flashing = make_config(tiny_causal, tmp_path, data={"packing": True}, attention="flash", precision="bf16")
    with pytest.raises(ConfigError, match=r"data.packing is true, with actions: take model.attention=sdpa"):
        wants_one_row(flashing, processor, family)
    assert wants_one_row(flashing, text, family)
    dense = make_config(tiny_causal, tmp_path, data={"packing": True}, attention="sdpa")
    assert not wants_one_row(dense, processor, family)
    assert not InputMaker(processor, family, CPU, torch.float32).in_one_row
