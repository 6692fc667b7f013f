"""A picture of a few samples: what the model saw, what it was told, the true action and the predicted one.

    +-------+  push the red cube to the goal
    | frame |  true       0.12 -0.03  0.00 ...
    +-------+  predicted  0.10 -0.02  0.01 ...

Shown beside the figures in TensorBoard and Weights & Biases, as `val/examples`. The prediction reads the true tokens before each
token, as the validation's own figures do. One row for each timestep of a chunk, up to `_MOST_STEPS`. `train/first_batch` shows
the first samples that a run trained on, with the action that their own tokens mean.
"""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from stoker_proto.errors import DataError
from stoker_proto.host.files import whole_file
from stoker_proto.processor import Processor
from trainer.evals.scores import action_positions, best_actions
from trainer.feed.batch import IGNORED, MicroBatch
from trainer.training.inputs import Inputs

log = logging.getLogger(__name__)

_SIDE, _TEXT_WIDTH, _LINE, _MARGIN = 160, 620, 14, 6
"""Pixels: side of a picture, width of the text beside it, height of a line, distance from the edge."""
_FIRST_SAMPLES = 8
_CHARACTERS, _MOST_LINES, _MOST_STEPS = 96, 3, 3
"""Of the instruction: characters of a line, lines; timesteps of an action that are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One sample with a prediction."""

    frame: NDArray[np.uint8] | None
    """uint8[H, W, 3]: its first image."""
    instruction: str
    true: NDArray[np.float32]
    """float32[K, D]."""
    found: NDArray[np.float32] | None
    """float32[K, D], predicted or decoded; None: the tokens cannot be decoded."""


class ExampleSheet:
    """The first samples with an action, on the rank that writes."""

    def __init__(self, processor: Processor, wanted: int, word: str = "predicted") -> None:
        """word: what the second line of an action is."""
        self._processor, self._wanted, self._word = processor, wanted, word
        self.examples: list[Example] = []

    def add(self, batch: MicroBatch, inputs: Inputs, logits: torch.Tensor) -> None:
        """Keep samples of a micro-batch while some are wanted, with the predicted action. logits: float32[B, P, V]; no rank waits
        for another one here."""
        vocabulary = self._processor.vocabulary
        actions = np.asarray(batch.actions)
        if len(self.examples) < self._wanted and vocabulary is not None and actions.size:
            mask = action_positions(inputs.targets, actions, vocabulary).cpu().numpy()
            self._keep(batch, mask, best_actions(logits, vocabulary.first_id, vocabulary.end_id).cpu().numpy())

    def add_trained(self, batch: MicroBatch) -> None:
        """Likewise, with the action that the labels mean."""
        vocabulary, labels = self._processor.vocabulary, np.asarray(batch.labels)
        if vocabulary is not None and np.asarray(batch.actions).size:
            self._keep(batch, (labels >= vocabulary.first_id) & (labels < vocabulary.end_id), labels)

    def _keep(self, batch: MicroBatch, mask: NDArray[np.bool_], chosen: NDArray[Any]) -> None:
        """mask [B, P]: which of the ids `chosen` [B, P] are an action's."""
        actions = np.asarray(batch.actions)
        for row in np.flatnonzero(mask.any(axis=1))[: max(self._wanted - len(self.examples), 0)]:
            first = int(np.asarray(batch.image_counts)[:row].sum())
            ids, labels = np.asarray(batch.input_ids)[row], np.asarray(batch.labels)[row]
            has_image = batch.pixels is not None and batch.image_counts[row] > 0
            self.examples.append(
                Example(
                    frame=np.array(batch.pixels[first]) if has_image and batch.pixels is not None else None,
                    instruction=self._processor.plain_text(ids[: int((labels != IGNORED).argmax())]),
                    true=np.array(actions[row]),
                    found=self._decode(chosen[row][mask[row]]),
                )
            )

    def _decode(self, ids: NDArray[np.int64]) -> NDArray[np.float32] | None:
        try:
            return self._processor.actions_from_ids(ids)
        except DataError:
            return None

    def write(self, path: Path) -> bool:
        """Write a PNG; False if no sample had an action."""
        if not self.examples:
            return False
        sheet = Image.new("RGB", (_SIDE + _TEXT_WIDTH, len(self.examples) * _SIDE), "white")
        for number, example in enumerate(self.examples):
            if example.frame is not None:
                sheet.paste(Image.fromarray(example.frame).resize((_SIDE, _SIDE)), (0, number * _SIDE))
            pen = ImageDraw.Draw(sheet)
            for line, text in enumerate(lines_of(example, self._word)):
                place = (_SIDE + _MARGIN, number * _SIDE + _MARGIN + line * _LINE)
                pen.text(place, text.encode("ascii", "replace").decode(), fill="black")
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as unfinished:
            sheet.save(unfinished, format="PNG")
        return True


def draw_first(batches: Sequence[MicroBatch], processor: Processor, output_dir: Path) -> dict[str, Path]:
    """The picture of the first samples that a rank trained on, by its name; {} where none has an action, or a disk is full."""
    sheet = ExampleSheet(processor, _FIRST_SAMPLES, "decoded")
    for batch in batches:
        sheet.add_trained(batch)
    picture = output_dir / "evals" / "examples" / "first-batch.png"
    try:
        return {"train/first_batch": picture} if sheet.write(picture) else {}
    except OSError as error:
        log.warning("%s cannot be written: %s", picture, error)
        return {}


def lines_of(example: Example, word: str = "predicted") -> list[str]:
    """The text beside the picture."""
    lines = textwrap.wrap(example.instruction, _CHARACTERS, max_lines=_MOST_LINES, placeholder=" ...")
    for step, true in enumerate(example.true[:_MOST_STEPS]):
        lines.append(f"true       {numbers_of(true)}")
        if example.found is not None:
            lines.append(f"{word:9}  {numbers_of(example.found[step])}")
    if example.found is None:
        lines.append(f"{word:9}  tokens that are no action")
    return lines


def numbers_of(action: NDArray[Any]) -> str:
    """An action float[D] in two digits after the point.

    >>> numbers_of(np.array([0.125, -1.0]))
    ' 0.12 -1.00'
    """
    return " ".join(f"{value:5.2f}" for value in action.tolist())
