"""A trained model as a policy: camera frames and an instruction in, actions out.

    policy = Policy.load("outputs/export")            # or a checkpoint: "outputs/checkpoints/step-00000500"
    actions = policy.act(frame, "push the cube to the goal")        # float32[chunk, D], in action units
    actions = policy.act(frame, "push", measurements={"state": state, "tcp_pose": pose, ...})   # if trained with them
    several = policy.act_batch([PolicyInput(images=[frame], instruction="push"), ...])     # float32[B, chunk, D]

Prompt, image transform, vocabulary and decoding come from `stoker_processor.json`, the object with which the loaders made the
training rows. Decoding is greedy: each token is the one with the largest logit among the action tokens that still fit into the
chunk. Inputs whose prompts have the same number of tokens share a forward pass, so no row is padded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from stoker_proto.errors import ConfigError, DataError
from stoker_proto.processor import Processor
from trainer.models.families import Family
from trainer.policy_io import STATE_NAMES, PolicyError, PolicyInput, Prediction
from trainer.policy_loading import load_parts
from trainer.training.inputs import PixelNormaliser

__all__ = ["Policy", "PolicyError", "PolicyInput", "Prediction"]


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
        """Load an export, or a checkpoint of a run (see `policy_loading`). dtype: default: that of the export.

        Raises ConfigError, DataError.
        """
        model, processor, family = load_parts(Path(folder), dtype)
        return cls(model.to(device), processor, family)

    @property
    def chunk(self) -> int:
        """Timesteps of a predicted chunk."""
        return self._codec.chunk

    @property
    def action_width(self) -> int:
        """D: numbers of one action."""
        return self._codec.dim

    def act(
        self,
        images: NDArray[Any] | Sequence[NDArray[Any]],
        instruction: str,
        state: NDArray[np.float32] | None = None,
        measurements: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> NDArray[np.float32]:
        """float32[chunk, D]: the predicted actions, in action units.

        images: one frame or a list of them; see `PolicyInput`, also for state and measurements.
        Raises DataError for another number of images than in training, a state for a model that was trained without, or a missing
        measurement; PolicyError for a model that computes NaN.
        """
        return self.predict([_input(images, instruction, state, measurements)])[0].actions

    def act_batch(self, inputs: Sequence[PolicyInput]) -> NDArray[np.float32]:
        """float32[B, chunk, D]: the actions of B inputs, in their order. Raises as `act`."""
        actions = [prediction.actions for prediction in self.predict(inputs)]
        return np.stack(actions) if actions else np.zeros((0, self.chunk, self.action_width), np.float32)

    def action_ids(
        self,
        images: NDArray[Any] | Sequence[NDArray[Any]],
        instruction: str,
        state: NDArray[np.float32] | None = None,
        measurements: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> NDArray[np.int64]:
        """int64[tokens]: the tokens that `act` decodes; together they fill the chunk exactly."""
        return self.predict([_input(images, instruction, state, measurements)])[0].ids

    def predict(self, inputs: Sequence[PolicyInput]) -> list[Prediction]:
        """One prediction for each input, in their order. Raises as `act`."""
        alike: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        prompts = []
        seen = [self.processor.see(one.images, one.measurements) for one in inputs]
        for index, (one, images) in enumerate(zip(inputs, seen, strict=True)):
            self._check_like_training(len(images), one.state)
            state = self._state_of(one)
            prompts.append(self.processor.prompt(one.instruction, len(images), state).astype(np.int64))
            alike[len(prompts[-1]), len(images)].append(index)
        found: dict[int, Prediction] = {}
        for indexes in alike.values():
            frames = [frame for index in indexes for frame in seen[index]]
            rows = self._decode(np.stack([prompts[index] for index in indexes]), frames)
            found.update(zip(indexes, rows, strict=True))
        return [found[index] for index in range(len(inputs))]

    @torch.no_grad()
    def _decode(self, prompts: NDArray[np.int64], frames: Sequence[NDArray[Any]]) -> list[Prediction]:
        """The predictions for prompts int64[B, T]; frames: those of all rows, in the order of the rows."""
        arguments: dict[str, Any] = {"input_ids": torch.from_numpy(prompts).to(self.model.device)}
        image = self.processor.image
        if self.family.marks is not None and image is not None:  # nothing of a prompt is an answer
            ends = torch.full((len(prompts),), prompts.shape[1], device=self.model.device)
            arguments |= self.family.marks(arguments["input_ids"], ends, image.token_id)
        if self.family.layout is not None and frames:
            arguments |= self.family.layout(self._normalise(torch.from_numpy(self._seen(frames)).to(self.model.device)))
        cache: Any = None
        ids: list[torch.Tensor] = []  # [B] each
        masses: list[torch.Tensor] = []  # [B] each
        lengths = torch.zeros(len(prompts), dtype=torch.int64, device=self.model.device)  # tokens of each row
        left = torch.full_like(lengths, self._codec.max_tokens)  # places to fill
        while bool((is_open := left > 0).any()):
            output = self.model(**arguments, past_key_values=cache, use_cache=True)
            logits = output.logits[:, -1].float()  # [B, vocabulary]
            actions = logits[:, self._vocabulary.first_id : self._vocabulary.end_id]  # [B, num_codes]
            self._check_finite(logits[is_open], actions[is_open], len(ids))
            beaten = (
                logits.max(dim=-1).values > actions.max(dim=-1).values
            )  # [B]: a token that is no action is likelier
            self.num_violations += int((beaten & is_open).sum())
            masses.append(-torch.expm1(actions.logsumexp(-1) - logits.logsumexp(-1)))
            # A row that is complete runs along with the others; its tokens are not used.
            best = actions.masked_fill(self._filled > left[:, None], -torch.inf).argmax(dim=-1)
            left = torch.where(is_open, left - self._filled[best], left)
            lengths += is_open
            ids.append(best + self._vocabulary.first_id)
            cache = output.past_key_values
            arguments = {"input_ids": ids[-1][:, None]}
        all_ids, all_masses = torch.stack(ids, dim=1).cpu().numpy(), torch.stack(masses, dim=1).cpu().numpy()
        counts = lengths.tolist()
        return [self._prediction(all_ids[row, :n], all_masses[row, :n]) for row, n in enumerate(counts)]

    def _prediction(self, ids: NDArray[np.int64], masses: NDArray[np.float32]) -> Prediction:
        actions = self.processor.actions_from_ids(ids)
        if not np.isfinite(actions).all():
            raise PolicyError(
                f"tokens {ids.tolist()} decode to {actions.tolist()}: finite actions are expected; export again"
            )
        return Prediction(actions=actions, ids=ids, outside_mass=float(np.clip(masses.mean(), 0, 1)))

    def _check_finite(self, logits: torch.Tensor, actions: torch.Tensor, token: int) -> None:
        """Raises PolicyError: the largest of logits that are NaN would still be an action, and a meaningless one."""
        if torch.isnan(logits).any() or not torch.isfinite(actions).all():
            raise PolicyError(
                f"the model's logits for action token {token} are not finite (NaN or infinite): its weights are damaged, or "
                "its training diverged; take an earlier export or checkpoint"
            )

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

    def _state_of(self, one: PolicyInput) -> NDArray[np.float32] | None:
        """The state for the prompt: as it was passed, else the measurement of that name."""
        if one.state is not None or not self.processor.needs_state:
            return one.state
        name = next((name for name in STATE_NAMES if name in one.measurements), None)
        return None if name is None else one.measurements[name]

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


def _input(
    images: NDArray[Any] | Sequence[NDArray[Any]],
    instruction: str,
    state: NDArray[np.float32] | None,
    measurements: Mapping[str, NDArray[np.float32]] | None,
) -> PolicyInput:
    frames = [images] if isinstance(images, np.ndarray) else list(images)
    return PolicyInput(images=frames, instruction=instruction, state=state, measurements=measurements or {})
