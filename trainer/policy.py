"""An exported model as a policy: camera frames and an instruction in, actions out.

    policy = Policy.load("outputs/export")
    actions = policy.act(frame, "push the cube to the goal")   # float32[chunk, D], in action units

Prompt, image transform, vocabulary and decoding come from `stoker_processor.json`, the object with which the loaders made the
training rows. Decoding is greedy: each token is the one with the largest logit among the action tokens that still fit into the
chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from stoker_proto.errors import ConfigError, DataError
from stoker_proto.processor import Processor
from trainer.models.families import Family, family_of, read_model_config
from trainer.training.inputs import PixelNormaliser


class Policy:
    """Predicts actions with one model."""

    def __init__(self, model: PreTrainedModel, processor: Processor, family: Family) -> None:
        """Raises ConfigError for a model that was not trained on actions."""
        if processor.codec is None or processor.vocabulary is None:
            raise ConfigError("this model was trained without actions, so it cannot be used as a policy")
        self.model, self.processor, self.family = model.eval(), processor, family
        self._codec, self._vocabulary = processor.codec, processor.vocabulary
        self.num_violations = 0
        """Tokens so far where the largest logit of all was no action token: the model has not learned yet what to answer with."""
        self._filled = self._places_filled()
        if processor.image is not None:
            self._normalise = PixelNormaliser(processor.image, model.device, model.dtype)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Policy:
        """Load an export. dtype: default: that of its weights. Raises ConfigError."""
        family = family_of(read_model_config(str(folder)))
        if not (Path(folder) / "stoker_processor.json").is_file():
            raise ConfigError(f"{folder}: there is no stoker_processor.json; name the folder that the trainer exported")
        model = family.auto_class.from_pretrained(folder, dtype=dtype or "auto", local_files_only=True)
        return cls(model.to(device), Processor.load(Path(folder)), family)

    def act(
        self,
        images: NDArray[Any] | Sequence[NDArray[Any]],
        instruction: str,
        state: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """float32[chunk, D]: the predicted actions, in action units.

        images: one uint8[H, W, 3] (a depth frame: uint16[H, W]), or a list of them. Pass as many images as in training.
        state: float32[S] in the dataset's units; only for a model that was trained with `data.state: text`.
        Raises DataError for another number of images than in training, or a state for a model that was trained without.
        """
        return self.processor.actions_from_ids(self.action_ids(images, instruction, state))

    @torch.no_grad()
    def action_ids(
        self,
        images: NDArray[Any] | Sequence[NDArray[Any]],
        instruction: str,
        state: NDArray[np.float32] | None = None,
    ) -> NDArray[np.int64]:
        """int64[tokens]: the tokens that `act` decodes; together they fill the chunk exactly."""
        frames = [images] if isinstance(images, np.ndarray) else list(images)
        self._check_like_training(len(frames), state)
        prompt = torch.from_numpy(self.processor.prompt(instruction, len(frames), state).astype(np.int64))
        arguments: dict[str, Any] = {"input_ids": prompt[None].to(self.model.device)}
        if self.family.layout is not None and frames:
            arguments |= self.family.layout(self._normalise(torch.from_numpy(self._seen(frames)).to(self.model.device)))
        cache: Any = None
        ids: list[torch.Tensor] = []
        left = self._codec.max_tokens
        while left > 0:
            output = self.model(**arguments, past_key_values=cache, use_cache=True)
            logits = output.logits[:, -1, self._vocabulary.first_id : self._vocabulary.end_id]  # [1, num_codes]
            self.num_violations += int((output.logits[:, -1].max(dim=-1).values > logits.max(dim=-1).values).sum())
            best = logits.masked_fill(self._filled > left, -torch.inf).argmax(dim=-1)  # [1]
            left -= int(self._filled[best])
            best = best + self._vocabulary.first_id
            cache = output.past_key_values
            arguments = {"input_ids": best[None]}
            ids.append(best)
        found: NDArray[np.int64] = torch.cat(ids).cpu().numpy()
        return found

    def _check_like_training(self, num_images: int, state: NDArray[np.float32] | None) -> None:
        """Raises DataError for other inputs than in training: the model would answer them, but badly."""
        seen = self.processor.num_images
        least, most = seen or (int(self.family.sees_images), None)  # exports of earlier versions do not have the number
        if num_images < least or (most is not None and num_images > most):
            expected = f"{least}" if least == most else f"{least} to {most}" if seen else f"{least} or more"
            raise DataError(
                f"{num_images} images: the samples that this model learned actions from have {expected} (the images of each "
                "camera, depth included, times the frames of image_history); pass as many, in the order of the training data"
            )
        if state is not None and not self.processor.needs_state:
            raise DataError("a state is given, but this model was trained without (data.state: none): leave it out")

    def _places_filled(self) -> torch.Tensor:
        """int64[num_codes], in the order of the ids: how many of a chunk's `max_tokens` places each action token fills.

        A codec of variable length finds the end of a chunk from this alone, so a token that does not fit is never chosen.
        """
        lengths = self._codec.code_lengths
        if lengths is None:
            lengths = np.ones(self._codec.num_codes, np.int32)
        codes = self._vocabulary.to_codes(np.arange(self._vocabulary.first_id, self._vocabulary.end_id))
        return torch.from_numpy(lengths[codes].astype(np.int64)).to(self.model.device)

    def _seen(self, frames: Sequence[NDArray[Any]]) -> NDArray[np.uint8]:
        """uint8[I, H, W, 3]: resized, encoded and decoded as in training, with the same loss."""
        image = self.processor.image
        if image is None:
            raise ConfigError("this model sees images, but its stoker_processor.json describes none: export it again")
        seen = np.empty((len(frames), image.height, image.width, 3), np.uint8)
        for frame, out in zip(frames, seen, strict=True):
            self.processor.decode_image(self.processor.encode_image(frame, None), out)
        return seen
