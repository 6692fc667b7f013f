"""MicroBatch (host, uint8) -> arguments of the model's forward (device, the model's number format).

Letters of shapes: B rows, T tokens of a row, I images, P positions whose logits are wanted.

All ranks must run the same modules. So where a model sees images but the micro-batch has none, one row with a black image and
no label is appended.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from stoker_proto.processor import ImageSpec, Processor
from trainer.feed.batch import IGNORED, MicroBatch
from trainer.models.families import Family

_FORWARDED = ("input_ids", "attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k")
"""Tensors that forward gets as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Arguments and targets of one forward."""

    arguments: dict[str, Any]
    """Keyword arguments of forward, without positions."""
    grid: torch.Tensor | None
    """Where all rows stand in one: int64[B * P], the place in it of each position of each row. None: they are rows."""
    positions: torch.Tensor
    """int64[P], ascending: positions at which some row has a label for the next token; [0] if none has."""
    targets: torch.Tensor
    """int64[B, P]: the token to predict there; -100 where the row has no label."""
    labels: torch.Tensor
    """int64[N], ascending: where targets, as int64[B * P], have a label; [0] if nowhere."""
    num_labels: int
    """N, or 0."""
    auxiliary: torch.Tensor
    """float32[B, A]: what is learned beside the tokens; NaN in rows without; A = 0 if no row has any."""
    num_rows: int
    """B of the micro-batch; a row appended here has no targets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """A micro-batch's tensors on the device, or on their way there."""

    tensors: dict[str, torch.Tensor]
    num_labels: int
    num_rows: int
    longest: int = 0
    """Tokens of the longest sample, where all rows stand in one."""
    ready: torch.cuda.Event | None = None
    """When the copies are complete; None on a CPU."""


class InputMaker:
    """Makes Inputs for one model on one device."""

    def __init__(self, processor: Processor, family: Family, device: torch.device, dtype: torch.dtype) -> None:
        self.processor, self.family, self.device, self.dtype = processor, family, device, dtype
        self.masks = True
        """Pass a mask of the padding; without, a model's attention needs no dense mask (see `mask_check`)."""
        self.in_one_row = False
        """Put packed rows behind one another into one row without padding, which is what flash attention takes."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        if family.sees_images and processor.image is not None:
            self._normalise = PixelNormaliser(processor.image, device, dtype)

    def copy(self, batch: MicroBatch) -> Copied:
        """Begin to copy all that the device needs of a batch, on a stream of its own, from pinned memory. On any thread."""
        host = self._on_host(batch)
        if self._stream is None:
            return host
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            sent = {name: self._send(tensor) for name, tensor in host.tensors.items()}
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(self._stream)
        return replace(host, tensors=sent, ready=ready)

    def __call__(self, batch: MicroBatch) -> Inputs:
        """Of a batch that was copied ahead (`MicroBatch.on_device`), or is copied now."""
        copied: Copied = self.copy(batch) if batch.on_device is None else batch.on_device
        if copied.ready is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied.ready)
            for tensor in copied.tensors.values():
                tensor.record_stream(stream)  # its memory belongs to the other stream
        tensors = copied.tensors
        arguments: dict[str, Any] = {name: tensors[name] for name in _FORWARDED if name in tensors}
        if copied.longest:
            arguments |= {"max_length_q": copied.longest, "max_length_k": copied.longest}
        if self.family.marks is not None and self.processor.image is not None:
            arguments |= self.family.marks(arguments["input_ids"], tensors["first"], self.processor.image.token_id)
        if self.family.layout is not None:
            arguments |= self.family.layout(self._normalise(tensors["pixels"]))
        return Inputs(
            arguments=arguments,
            grid=tensors.get("grid"),
            positions=tensors["positions"],
            targets=tensors["targets"],
            labels=tensors["labels"],
            num_labels=copied.num_labels,
            auxiliary=tensors["auxiliary"],
            num_rows=copied.num_rows,
        )

    def _on_host(self, batch: MicroBatch) -> Copied:
        """All tensors that the device needs, still on the host."""
        host = {"input_ids": torch.as_tensor(batch.input_ids), "attention_mask": torch.as_tensor(batch.attention_mask)}
        if batch.positions is not None:
            host["position_ids"] = torch.as_tensor(batch.positions)
        pixels = batch.pixels
        if self.family.sees_images and (pixels is None or len(pixels) == 0):
            host, pixels = self._with_dummy(host)
        if self.family.marks is not None:
            host["first"] = first_labels(np.asarray(batch.labels), *host["input_ids"].shape)
        positions, targets = next_token_targets(np.asarray(batch.labels))
        longest = 0
        if batch.positions is not None and self.in_one_row:
            host, longest = in_one_row(host, positions, len(targets), with_lengths=not self.family.sees_images)
        elif batch.positions is not None or not self.masks:
            # Without a mask, transformers starts a new sequence wherever positions do not increase by one, also in the padding.
            del host["attention_mask"]
        if self.family.layout is not None:
            host["pixels"] = torch.as_tensor(pixels)
        labels = np.flatnonzero(targets != IGNORED)
        host["positions"], host["targets"] = torch.from_numpy(positions), torch.from_numpy(targets)
        host["labels"] = torch.from_numpy(labels if labels.size else np.zeros(1, np.int64))
        host["auxiliary"] = torch.as_tensor(batch.auxiliary)
        return Copied(tensors=host, num_labels=labels.size, num_rows=len(targets), longest=longest)

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        return pinned.to(self.device, non_blocking=True)

    def _with_dummy(
        self, host: dict[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], np.ndarray[Any, np.dtype[np.uint8]]]:
        """Append a row with the tokens of one image; lengthen the other rows if they are shorter."""
        image = self.processor.image
        assert (
            image is not None
        )  # checked in build: a model that sees images needs a processor with an image description
        rows, width = host["input_ids"].shape
        length = max(width, image.num_tokens)
        longer = {
            "input_ids": torch.full((rows + 1, length), self.processor.pad_id, dtype=torch.int64),
            "attention_mask": torch.zeros((rows + 1, length), dtype=torch.int64),
            "position_ids": torch.zeros((rows + 1, length), dtype=torch.int64),
        }
        for name, tensor in host.items():
            longer[name][:-1, :width] = tensor
        longer["input_ids"][-1, : image.num_tokens] = image.token_id
        longer["attention_mask"][-1, : image.num_tokens] = 1
        longer["position_ids"][-1, : image.num_tokens] = torch.arange(image.num_tokens)
        pixels = np.zeros((1, image.height, image.width, 3), np.uint8)
        return {name: longer[name] for name in host}, pixels


class PixelNormaliser:
    """uint8[I, H, W, 3] -> float[I, C, H, W] = (pixel * rescale - mean) / std, as the model's own processor would.

    C is 3, or 6 where the model wants the image normalised twice.
    """

    def __init__(self, image: ImageSpec, device: torch.device, dtype: torch.dtype) -> None:
        means, stds = (*image.mean, *(image.second_mean or ())), (*image.std, *(image.second_std or ()))
        mean, std = (torch.tensor(values, dtype=torch.float32, device=device) for values in (means, stds))
        scale, shift = image.rescale / std, mean / std  # [C] each
        self._scale, self._shift = scale[:, None, None], shift[:, None, None]
        self._dtype = dtype

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Computed in float32, then converted to the model's number format."""
        if len(self._scale) > 3:
            pixels = torch.cat([pixels, pixels], dim=-1)
        normal = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return (
            normal.mul_(self._scale).sub_(self._shift).to(self._dtype)
        )  # in place: fresh memory costs as much as the sums


def first_labels(labels: np.ndarray[Any, np.dtype[np.int64]], num_rows: int, length: int) -> torch.Tensor:
    """int64[num_rows]: the place of each row's first label; `length` where a row has none, as an appended row has."""
    is_label = labels != IGNORED  # [B, T]
    first = np.full(num_rows, length, np.int64)
    first[: len(labels)] = np.where(is_label.any(axis=1), is_label.argmax(axis=1), length)
    return torch.from_numpy(first)


def next_token_targets(
    labels: np.ndarray[Any, np.dtype[np.int64]],
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]]:
    """(positions int64[P], targets int64[B, P]) of labels int64[B, T].

    The logits at position t predict the token at t + 1:

        labels [[-100, -100, 7, 8]]   ->   positions [1, 2], targets [[7, 8]]
    """
    following = labels[:, 1:]
    positions = np.flatnonzero((following != IGNORED).any(axis=0))
    if not positions.size:  # one position is kept: a forward without any output has no backward to run on this rank
        positions = np.zeros(1, np.int64)
    targets = following[:, positions] if following.shape[1] else np.full((len(labels), 1), IGNORED, np.int64)
    return positions.astype(np.int64), np.ascontiguousarray(targets)


def in_one_row(
    rows: dict[str, torch.Tensor], positions: np.ndarray[Any, np.dtype[np.int64]], num_rows: int, *, with_lengths: bool
) -> tuple[dict[str, torch.Tensor], int]:
    """(the tokens of packed rows behind one another, tokens of the longest sample; 0 without lengths).

    rows: input_ids, attention_mask and position_ids int64[B', T]; positions: int64[P] in each of the first num_rows rows.
    with_lengths: also where each sample begins and ends, int32[samples + 1], as transformers passes it to flash attention.
    Without, it finds that out in each layer, from position ids that begin anew.

        ids 5 6 7 8 9 - - -   ->   5 6 7 8 9 1 2     positions 0 1 2 0 1 0 1     cumulative lengths 0 3 5 7
            1 2 - - - - - -
    """
    inside = rows["attention_mask"].bool()  # [B', T]
    ids, places = rows["input_ids"][inside][None], rows["position_ids"][inside][None]
    lengths = inside.sum(dim=1).numpy()  # [B']
    first = (np.cumsum(lengths) - lengths)[:num_rows]
    last = first + lengths[:num_rows] - 1
    grid = np.minimum(
        first[:, None] + positions, last[:, None]
    ).ravel()  # behind a row's end is no label: any place will do
    found = {
        name: tensor for name, tensor in rows.items() if name not in ("input_ids", "attention_mask", "position_ids")
    }
    found |= {"input_ids": ids, "position_ids": places, "grid": torch.from_numpy(grid)}
    if not with_lengths:
        return found, 0
    begins = np.flatnonzero(places[0].numpy() == 0)
    ends = np.append(begins, ids.shape[1]).astype(np.int32)  # [samples + 1]
    found |= {"cu_seq_lens_q": torch.from_numpy(ends), "cu_seq_lens_k": torch.from_numpy(ends)}
    return found, int(np.diff(ends).max())
