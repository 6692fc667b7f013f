"""Token ids -> an action, as the published `predict_action` does it, but never from a token that is no action.

    id 31872   vocabulary 32000 - id = 128   bin 127 of 255   centre 0.0   unnormalised by q01 and q99 where the mask is true

The published code reads any other token as about +1.0; here logits are masked to the action ids [31744, 32000), and
`model.num_violations` counts how often the largest of all logits was none of them. Policies of Stoker's exports are
`trainer.policy.Policy`; this is for published folders, which have no stoker_processor.json.
Source: openvla `prismatic/extern/hf/modeling_prismatic.py`, `prismatic/vla/action_tokenizer.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LogitsProcessor, LogitsProcessorList

EMPTY_TOKEN_ID = 29871
"""Llama's token of a single blank. In training it stands between "Out:" and the action."""


def predict(model: Any, input_ids: torch.Tensor, unnorm_key: str | None, **others: Any) -> NDArray[np.float64]:
    """float64[D] for one row, greedy unless `others` (arguments of `generate`) say otherwise.

    input_ids: int64[1, T]. Raises ValueError for several rows, or a key that `norm_stats` does not have.
    """
    if len(input_ids) != 1:
        raise ValueError(f"{len(input_ids)} rows: an action is predicted for one row at a time")
    statistics = action_statistics(model.config.norm_stats, unnorm_key)
    if int(input_ids[0, -1]) != EMPTY_TOKEN_ID:
        input_ids = torch.cat([input_ids, input_ids.new_full((1, 1), EMPTY_TOKEN_ID)], dim=1)
        mask = others.get("attention_mask")
        if mask is not None:
            others["attention_mask"] = torch.cat([mask, mask.new_ones((1, 1))], dim=1)
    vocab_size = model.config.text_config.vocab_size - model.config.pad_to_multiple_of
    only = OnlyActions(vocab_size - model.config.n_action_bins, vocab_size)
    num_tokens = len(statistics["q01"])
    sequences = model.generate(
        input_ids, max_new_tokens=num_tokens, min_new_tokens=num_tokens,
        logits_processor=LogitsProcessorList([only]), **{"do_sample": False, **others},
    )  # fmt: skip
    model.num_violations = only.num_violations
    return unnormalise(
        sequences[0, -num_tokens:].cpu().numpy(), statistics, vocab_size=vocab_size, num_bins=model.config.n_action_bins
    )


def unnormalise(
    ids: NDArray[np.integer[Any]], statistics: dict[str, Any], *, vocab_size: int, num_bins: int
) -> NDArray[np.float64]:
    """int[D] ids of action tokens -> float64[D] in the units of the statistics (`q01`, `q99`, `mask`)."""
    edges = np.linspace(-1, 1, num_bins)
    centres = (edges[:-1] + edges[1:]) / 2.0
    normalised = centres[np.clip(vocab_size - ids - 1, 0, len(centres) - 1)]
    low, high = np.asarray(statistics["q01"]), np.asarray(statistics["q99"])
    mask = np.asarray(statistics.get("mask", np.ones(len(low), bool)))
    action: NDArray[np.float64] = np.where(mask, 0.5 * (normalised + 1) * (high - low) + low, normalised)
    return action


def action_statistics(norm_stats: dict[str, Any] | None, key: str | None) -> dict[str, Any]:
    """`norm_stats[key]["action"]`; without a key that of the only dataset. Raises ValueError."""
    known = norm_stats or {}
    if key is None and len(known) == 1:
        key = next(iter(known))
    if key not in known:
        raise ValueError(f"unnorm_key is {key!r}: norm_stats of config.json has {', '.join(known) or 'none'}; name one")
    found: dict[str, Any] = known[key]["action"]
    return found


class OnlyActions(LogitsProcessor):  # type: ignore[misc]  # transformers comes without types
    """Lets generation choose ids in [first, end) only, and counts the steps at which it would have chosen another."""

    def __init__(self, first: int, end: int) -> None:
        self.first, self.end = first, end
        self.num_violations = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores: float[B, V]."""
        best = scores.argmax(dim=-1)
        self.num_violations += int(((best < self.first) | (best >= self.end)).sum())
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, self.first : self.end] = scores[:, self.first : self.end]
        return allowed
