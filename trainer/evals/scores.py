"""Sums over validation samples, and the metrics computed from them. Sums add up over micro-batches and over ranks.

Letters of shapes: B rows, P positions with a label in some row, V vocabulary, K timesteps of a chunk, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stoker_proto.actions.vocabulary import ActionVocabulary
from stoker_proto.errors import DataError
from stoker_proto.processor import Processor
from trainer.feed.batch import IGNORED
from trainer.training.loss import nll_of_tokens, perplexity

_COUNTERS = (
    "samples", "tokens", "nll", "correct", "action_tokens", "action_nll", "violations", "chunks", "undecodable",
    "bad",
)  # fmt: skip


@dataclass(slots=True)
class Sums:
    """All sums, in float64."""

    dim: int
    """D; 0 for sources without actions."""
    samples: float = 0.0
    bad: float = 0.0
    """Of them, those that could not be read (`data.on_bad_sample: skip`): rows without labels."""
    tokens: float = 0.0
    nll: float = 0.0
    correct: float = 0.0
    action_tokens: float = 0.0
    action_nll: float = 0.0
    violations: float = 0.0
    """Action positions at which the largest logit is not an action token."""
    chunks: float = 0.0
    """Action chunks that could be decoded."""
    undecodable: float = 0.0
    """Action chunks whose predicted codes cannot be decoded (codecs of variable length)."""
    timesteps: float = 0.0
    error: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """float64[D]: sum of |decoded - true| in action units over the timesteps of decoded chunks."""

    def __post_init__(self) -> None:
        if not self.error.size:
            self.error = np.zeros(self.dim)

    def to_vector(self) -> list[float]:
        """For an all-reduce."""
        return [*(getattr(self, name) for name in _COUNTERS), self.timesteps, *self.error.tolist()]

    @classmethod
    def from_vector(cls, dim: int, vector: list[float]) -> Sums:
        """The inverse of to_vector."""
        counters = dict(zip(_COUNTERS, vector, strict=False))
        rest = vector[len(_COUNTERS) :]
        return cls(dim=dim, **counters, timesteps=rest[0], error=np.asarray(rest[1:], dtype=np.float64))

    def metrics(self) -> dict[str, float]:
        """perplexity = exp(sum NLL / sum tokens); action metrics only if there are actions."""
        found: dict[str, float] = {"samples": self.samples}
        if self.bad:
            found["bad_samples"] = self.bad
        if self.tokens:
            found |= {"perplexity": perplexity(self.nll / self.tokens), "accuracy": self.correct / self.tokens}
        if self.action_tokens:
            found["action_perplexity"] = perplexity(self.action_nll / self.action_tokens)
            found["action_violations"] = self.violations
            found["action_undecodable"] = self.undecodable
        if self.timesteps:
            found |= {f"action_mae/dim_{i}": value / self.timesteps for i, value in enumerate(self.error.tolist())}
            found["action_mae/mean"] = float(self.error.mean() / self.timesteps)
        return found


def add_rows(sums: Sums, rows: torch.Tensor) -> None:
    """Add one micro-batch without actions. rows: float64[B, 3], as `row_sums` has them."""
    nll, correct, tokens = rows.sum(dim=0).tolist()
    sums.nll += nll
    sums.correct += correct
    sums.tokens += tokens


def add_scores(
    sums: Sums, logits: torch.Tensor, targets: torch.Tensor, actions: NDArray[Any], processor: Processor
) -> None:
    """Add one micro-batch.

    logits: float32[B, P, V]; targets: int64[B, P], -100 where there is no label; actions: float32[B, K, D], the truth, NaN in
    rows without actions, whose text may contain the same ids (`data.action.vocabulary: reuse_last`).
    Actions are decoded from the largest logit among the action tokens at each action position, given the true tokens
    before it (teacher forcing).
    """
    labelled = targets != IGNORED
    nll = nll_of_tokens(logits, targets).double()
    best = logits.argmax(dim=-1)
    sums.tokens += float(labelled.sum())
    sums.nll += float(nll.sum())
    sums.correct += float(((best == targets) & labelled).sum())
    vocabulary = processor.vocabulary
    if vocabulary is None or actions.size == 0:
        return
    is_action = action_positions(targets, actions, vocabulary)
    sums.action_tokens += float(is_action.sum())
    sums.action_nll += float(nll[is_action].sum())
    outside = (best < vocabulary.first_id) | (best >= vocabulary.end_id)
    sums.violations += float((outside & is_action).sum())
    chosen = best_actions(logits, vocabulary.first_id, vocabulary.end_id).cpu().numpy()  # [B, P]
    for row, mask in enumerate(is_action.cpu().numpy()):
        if mask.any():
            add_error(sums, chosen[row][mask], actions[row], processor)


def action_positions(targets: torch.Tensor, actions: NDArray[Any], vocabulary: ActionVocabulary) -> torch.Tensor:
    """bool[B, P]: where a row that has an action has one of its tokens. targets: int64[B, P]; actions: float32[B, K, D]."""
    if actions.size == 0:
        return torch.zeros_like(targets, dtype=torch.bool)
    has_action = torch.from_numpy(~np.isnan(actions).all(axis=(1, 2))).to(targets.device)  # bool[B]
    return (targets >= vocabulary.first_id) & (targets < vocabulary.end_id) & has_action[:, None]


def best_actions(logits: torch.Tensor, first_id: int, end_id: int) -> torch.Tensor:
    """int64[...]: the action token with the largest logit. logits: float[..., V]."""
    return logits[..., first_id:end_id].argmax(dim=-1) + first_id


def add_error(sums: Sums, ids: NDArray[np.int64], truth: NDArray[np.float32], processor: Processor) -> None:
    """Add one chunk. ids: int64[T], the predicted tokens; truth: float32[K, D]."""
    try:
        decoded = processor.actions_from_ids(ids)  # float32[K, D]
    except DataError:
        sums.undecodable += 1
        return
    sums.chunks += 1
    sums.timesteps += len(truth)
    sums.error += np.abs(decoded.astype(np.float64) - truth.astype(np.float64)).sum(axis=0)
