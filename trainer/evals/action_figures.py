"""Figures of predicted actions that a low loss cannot hide behind:

    free-running error     How far off are actions when the model reads its own tokens, as a policy does? With teacher forcing it
                           reads the true ones, which hides errors that grow from token to token.
    best constant action   How far off is the best action that never looks? For absolute errors that is the median of each
                           dimension. A model that is not clearly better has learned nothing from the pictures.
    varying tokens         How surprising are the tokens that differ between samples? A dimension that is always 0 has a
                           perplexity of 1 and makes the mean look good. The codec's name is part of the figure's: a token of `vq`
                           says as much as several of `bins`, so that their perplexities are not comparable.
    outside mass           How much probability does the model give to tokens that are no actions, where an action is due?

Letters of shapes: B rows, P positions with a label in some row, V vocabulary, K timesteps of a chunk, D dimensions, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stoker_proto.actions.statistics import ActionStatistics
from stoker_proto.actions.vocabulary import ActionVocabulary
from stoker_proto.processor import Processor
from trainer.engine.ranks import Ranks, max_over_ranks, sum_over_ranks
from trainer.evals.scores import Sums, action_positions, add_error, best_actions
from trainer.training.inputs import Inputs
from trainer.training.loss import nll_of_tokens, perplexity
from trainer.training.step import Stepper

_BINS = 512
"""Of the histogram from which the median is taken."""


class ActionFigures:
    """Sums of one validation; the processor must have a codec."""

    def __init__(self, processor: Processor) -> None:
        assert processor.codec is not None
        assert processor.vocabulary is not None
        codec = processor.codec
        self._processor, self._codec, self._vocabulary = processor, codec, processor.vocabulary
        self._free = Sums(codec.dim)
        self._constant = BestConstant(codec.statistics)
        self._varying = VaryingTokens(codec.max_tokens)
        self._outside = self._num_tokens = 0.0

    def add(self, stepper: Stepper, inputs: Inputs, logits: torch.Tensor, actions: NDArray[Any], *, free: bool) -> None:
        """Add one micro-batch. Every rank calls it as often, with the same `free`: whether the free-running error is wanted.

        logits: float32[B, P, V], as the model gives them for `inputs`; actions: float32[B, K, D], NaN in rows without.
        """
        is_action = action_positions(inputs.targets, actions, self._vocabulary)  # bool[B, P]
        nll = nll_of_tokens(logits, inputs.targets)
        self._outside += float(outside_mass(logits, self._vocabulary)[is_action].double().sum())
        self._num_tokens += float(is_action.sum())
        targets = inputs.targets.cpu().numpy()
        masks, losses = is_action.cpu().numpy(), nll.double().cpu().numpy()
        chosen = None
        if free and self._codec.code_lengths is None:
            most = self._codec.max_tokens - 1
            ids = free_running_ids(stepper, inputs, is_action, logits, self._vocabulary, most)
            chosen = ids.cpu().numpy()
        for row in np.flatnonzero(masks.any(axis=1)):
            mask = masks[row]
            self._varying.add(targets[row][mask], losses[row][mask])
            if np.isfinite(actions[row]).all():
                self._constant.add(actions[row])
            if chosen is not None:
                add_error(self._free, chosen[row][mask], actions[row], self._processor)

    def metrics(self, forced: Mapping[str, float], ranks: Ranks) -> dict[str, float]:
        """The figures over all ranks; every rank calls it. forced: the metrics with teacher forcing, to compare with."""
        self._varying.reduce(ranks)
        vectors = [self._free.to_vector(), self._constant.to_vector()]
        own = [self._outside, self._num_tokens]
        outside, num_tokens, *sums = sum_over_ranks([*own, *vectors[0], *vectors[1]], ranks)
        split = len(vectors[0])
        free, constant = Sums.from_vector(self._codec.dim, sums[:split]), self._constant.from_vector(sums[split:])
        found = self._varying.metrics(self._codec.name)
        if num_tokens:
            found["action_outside_mass"] = outside / num_tokens
        if not constant.number:
            return found
        errors = constant.errors()
        found |= _per_dimension("action_mae_constant", errors)
        base = float(errors.mean())
        if base > 0 and "action_mae/mean" in forced:
            found["action_mae_vs_constant"] = forced["action_mae/mean"] / base
        if free.timesteps:
            errors = free.error / free.timesteps
            found |= _per_dimension("action_mae_free", errors)
            if base > 0:
                found["action_mae_free_vs_constant"] = float(errors.mean()) / base
        return found


def _per_dimension(name: str, errors: NDArray[np.float64]) -> dict[str, float]:
    each = {f"{name}/dim_{number}": float(error) for number, error in enumerate(errors)}
    return {**each, f"{name}/mean": float(errors.mean())}


def outside_mass(logits: torch.Tensor, vocabulary: ActionVocabulary) -> torch.Tensor:
    """float32[B, P]: the probability of all tokens that are no action tokens, in [0, 1]."""
    actions = logits[..., vocabulary.first_id : vocabulary.end_id]
    return (-torch.expm1(actions.logsumexp(-1) - logits.logsumexp(-1))).clamp(0, 1)


def free_running_ids(
    stepper: Stepper,
    inputs: Inputs,
    is_action: torch.Tensor,
    logits: torch.Tensor,
    vocabulary: ActionVocabulary,
    most: int,
) -> torch.Tensor:
    """int64[B, P]: at the action positions, the tokens that the model chooses when it reads its own tokens.

    All tokens are fed back at once until none changes: then each follows from those before it, so they are what decoding one by
    one gives. The k-th pass makes at least the first k + 1 tokens final, so `most` = tokens of a chunk - 1 passes always suffice;
    a model whose tokens do not depend on each other needs one. Every rank runs the same number of passes.
    """
    first, end = vocabulary.first_id, vocabulary.end_id
    chosen = best_actions(logits, first, end)  # right for the first token of each chunk
    rows, columns = is_action.nonzero(as_tuple=True)
    places = inputs.positions[columns] + 1
    ids = inputs.arguments["input_ids"].clone()
    for _ in range(most):
        ids[rows, places] = chosen[rows, columns]
        fed = replace(inputs, arguments={**inputs.arguments, "input_ids": ids})
        again = best_actions(stepper.logits(fed), first, end)
        has_changed = bool((again[rows, columns] != chosen[rows, columns]).any())
        chosen = again
        if not max_over_ranks([float(has_changed)], stepper.ranks)[0]:
            break
    return chosen


class BestConstant:
    """Mean absolute error of each dimension's median, from a histogram: exact to a bin's width, a 512th of the range."""

    def __init__(self, statistics: ActionStatistics) -> None:
        self._low = statistics.min
        self._width = np.maximum(statistics.max - statistics.min, np.finfo(np.float32).tiny)
        self._counts = np.zeros((statistics.dim, _BINS))
        self._sums = np.zeros((statistics.dim, _BINS))

    def add(self, actions: NDArray[Any]) -> None:
        """actions: float32[K, D]."""
        values = actions.astype(np.float64)
        bins = np.clip((values - self._low) / self._width * _BINS, 0, _BINS - 1).astype(np.int64)
        dims = np.broadcast_to(np.arange(bins.shape[1]), bins.shape)
        np.add.at(self._counts, (dims, bins), 1)
        np.add.at(self._sums, (dims, bins), values)

    def to_vector(self) -> list[float]:
        """For an all-reduce."""
        return [*self._counts.ravel().tolist(), *self._sums.ravel().tolist()]

    def from_vector(self, vector: list[float]) -> BestConstant:
        """The sum of all ranks."""
        total = object.__new__(BestConstant)
        total._low, total._width = self._low, self._width
        total._counts, total._sums = np.asarray(vector).reshape(2, *self._counts.shape)
        return total

    @property
    def number(self) -> int:
        """Timesteps."""
        return int(self._counts[0].sum())

    def errors(self) -> NDArray[np.float64]:
        """float64[D], of at least one timestep."""
        below = np.cumsum(self._counts, axis=1)
        middle = (below >= below[:, -1:] / 2).argmax(axis=1)  # [D]: the bin of the median
        dims = np.arange(len(middle))
        median = self._sums[dims, middle] / self._counts[dims, middle]
        distances = np.abs(
            self._sums - median[:, None] * self._counts
        )  # of all actions of a bin, which lie on one side
        found: NDArray[np.float64] = distances.sum(axis=1) / below[:, -1]
        return found


class VaryingTokens:
    """NLL of each place of a chunk, and whether its token differs between samples."""

    def __init__(self, num_places: int) -> None:
        self._nll, self._counts = np.zeros(num_places), np.zeros(num_places)
        self._least, self._most = np.full(num_places, np.inf), np.full(num_places, -np.inf)

    def add(self, ids: NDArray[np.int64], nll: NDArray[np.float64]) -> None:
        """One chunk: int64[T], float64[T]."""
        places = slice(0, len(ids))
        self._nll[places] += nll
        self._counts[places] += 1
        self._least[places] = np.minimum(self._least[places], ids)
        self._most[places] = np.maximum(self._most[places], ids)

    def reduce(self, ranks: Ranks) -> None:
        """Take in the other ranks; every rank calls it, once."""
        size = len(self._nll)
        extremes = max_over_ranks([*(-self._least).tolist(), *self._most.tolist()], ranks)
        self._least, self._most = -np.asarray(extremes[:size]), np.asarray(extremes[size:])
        sums = sum_over_ranks([*self._nll.tolist(), *self._counts.tolist()], ranks)
        self._nll, self._counts = np.asarray(sums[:size]), np.asarray(sums[size:])

    def metrics(self, codec: str) -> dict[str, float]:
        """Perplexity over the places whose token varies, and how many these are."""
        varies = (self._counts > 0) & (self._least < self._most)
        found = {f"varying_tokens/{codec}": float(varies.sum())} if self._counts.any() else {}
        if varies.any():
            found[f"varying_perplexity/{codec}"] = perplexity(
                float(self._nll[varies].sum() / self._counts[varies].sum())
            )
        return found
