"""Filling in the middle: a text is cut at two places and rearranged, so that a model learns to write what is missing.

    "abcdef" cut at 2 and 4:
    PSM    <fim_prefix>ab<fim_suffix>ef<fim_middle>cd
    SPM    <fim_prefix><fim_suffix>ef<fim_middle>abcd

Bavarian et al. 2022, "Efficient training of language models to fill in the middle", cut at characters, as StarCoder's data;
SPM is the paper's variant whose tokens are those of PSM with nothing between the first two. What is done to a text is a
keyed hash of the seed and the text itself: the same on every loader and in every epoch.
"""

from __future__ import annotations

from typing import NamedTuple

from stoker_proto.hashing import key64

_ONE = 1 << 64


class FimTokens(NamedTuple):
    """Special tokens of the model."""

    prefix: str
    middle: str
    suffix: str


def fill_in_the_middle(text: str, tokens: FimTokens, rate: float, spm_rate: float, seed: int) -> str:
    """The text, rearranged with probability `rate`, and then with probability `spm_rate` in the order SPM."""
    key = key64("fim", seed, text) if rate else 0
    if key64("fim rate", key) >= rate * _ONE:
        return text
    cuts = sorted(key64("fim cut", key, i) * (len(text) + 1) // _ONE for i in range(2))
    prefix, middle, suffix = text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]
    if key64("fim order", key) < spm_rate * _ONE:
        return f"{tokens.prefix}{tokens.suffix}{suffix}{tokens.middle}{prefix}{middle}"
    return f"{tokens.prefix}{prefix}{tokens.suffix}{suffix}{tokens.middle}{middle}"
