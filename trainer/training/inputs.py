"""MicroBatch (host, uint8) -> arguments of the model's forward (device, the model's number format).

Letters of shapes: B rows, T tokens of a row, I images, P positions whose logits are wanted.

All ranks must run the same modules. So where a model sees images but the micro-batch has none, one row with a black image and
no label is appended.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stoker_proto.processor import ImageSpec, Processor
from trainer.feed.batch import IGNORED, MicroBatch
from trainer.models.families import Family


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Arguments and targets of one forward."""

    arguments: dict[str, torch.Tensor]
    """Keyword arguments of forward, without positions."""
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


class InputMaker:
    """Makes Inputs for one model on one device."""

    def __init__(self, processor: Processor, family: Family, device: torch.device, dtype: torch.dtype) -> None:
        self.processor, self.family, self.device, self.dtype = processor, family, device, dtype
        if family.sees_images and processor.image is not None:
            self._normalise = PixelNormaliser(processor.image, device, dtype)

    def __call__(self, batch: MicroBatch) -> Inputs:
        """Copy a batch to the device; pinned buffers are copied while the device computes."""
        host = {"input_ids": torch.as_tensor(batch.input_ids)}
        if batch.positions is None:
            host["attention_mask"] = torch.as_tensor(batch.attention_mask)
        else:
            # Without a mask, transformers starts a new sequence wherever positions do not increase by one, also in the padding.
            host["position_ids"] = torch.as_tensor(batch.positions)
        pixels = batch.pixels
        if self.family.sees_images and (pixels is None or len(pixels) == 0):
            host, pixels = self._with_dummy(host)
        positions, targets = next_token_targets(np.asarray(batch.labels))
        arguments = {name: self._to_device(tensor) for name, tensor in host.items()}
        if self.family.marks is not None and self.processor.image is not None:
            first = self._to_device(first_labels(np.asarray(batch.labels), *arguments["input_ids"].shape))
            arguments |= self.family.marks(arguments["input_ids"], first, self.processor.image.token_id)
        if self.family.layout is not None:
            arguments |= self.family.layout(self._normalise(self._to_device(torch.as_tensor(pixels))))
        labels = np.flatnonzero(targets != IGNORED)
        return Inputs(
            arguments=arguments,
            positions=self._to_device(torch.from_numpy(positions)),
            targets=self._to_device(torch.from_numpy(targets)),
            labels=self._to_device(torch.from_numpy(labels if labels.size else np.zeros(1, np.int64))),
            num_labels=labels.size,
            auxiliary=self._to_device(torch.as_tensor(batch.auxiliary)),
            num_rows=len(targets),
        )

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)

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
        self._scale, self._shift = image.rescale / std, mean / std  # [C] each
        self._dtype = dtype

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Computed in float32, then converted to the model's number format."""
        values = pixels.to(torch.float32)
        if len(self._scale) > 3:
            values = torch.cat([values, values], dim=-1)
        normal = values * self._scale - self._shift
        return normal.permute(0, 3, 1, 2).to(self._dtype).contiguous()


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
