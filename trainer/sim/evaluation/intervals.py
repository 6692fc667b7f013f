"""95% intervals for success rates, and for the difference of two policies on the same seeds.

Wilson's score interval: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927). Unlike p +- 1.96 s it stays inside [0, 1], and 30 of 30 is
not "100% +- 0".
Paired difference: R. G. Newcombe, Statistics in Medicine 17 (1998) 2635-2650, method 10: both rates' Wilson intervals are put
together with the correlation of the two outcomes of a seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.959963984540054
"""Quantile 0.975 of the normal distribution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A number between two bounds; rates and their differences are fractions, not percent."""

    value: float
    low: float
    high: float


def wilson(successes: int, number: int) -> Interval:
    """The rate successes / number. Of no episode, everything is possible."""
    if not number:
        return Interval(value=math.nan, low=0.0, high=1.0)
    rate, square = successes / number, Z * Z
    middle = (rate + square / (2 * number)) / (1 + square / number)
    half = Z * math.sqrt(rate * (1 - rate) / number + square / (4 * number * number)) / (1 + square / number)
    # At 0 and at all the bound is the rate itself; the formula misses it by a rounding error.
    low = 0.0 if successes == 0 else middle - half
    high = 1.0 if successes == number else middle + half
    return Interval(value=rate, low=low, high=high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Seeds by the outcomes of two policies."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @classmethod
    def of(cls, outcomes: Sequence[tuple[bool, bool]]) -> Pairs:
        """Count (success of the first, success of the second)."""
        counted = [outcomes.count(kind) for kind in ((True, True), (True, False), (False, True), (False, False))]
        return cls(both=counted[0], only_first=counted[1], only_second=counted[2], neither=counted[3])

    @property
    def number(self) -> int:
        """Seeds."""
        return self.both + self.only_first + self.only_second + self.neither


def paired_difference(pairs: Pairs) -> Interval:
    """Rate of the first minus rate of the second."""
    if not pairs.number:
        return Interval(value=math.nan, low=-1.0, high=1.0)
    first = wilson(pairs.both + pairs.only_first, pairs.number)
    second = wilson(pairs.both + pairs.only_second, pairs.number)
    value = (pairs.only_first - pairs.only_second) / pairs.number
    correlation = _correlation(pairs)

    def reach(towards_first: float, towards_second: float) -> float:
        product = 2 * correlation * towards_first * towards_second
        return math.sqrt(max(0.0, towards_first**2 - product + towards_second**2))

    return Interval(
        value=value,
        low=value - reach(first.value - first.low, second.high - second.value),
        high=value + reach(first.high - first.value, second.value - second.low),
    )


def _correlation(pairs: Pairs) -> float:
    """Phi of the two outcomes, with Newcombe's continuity correction where it is positive."""
    a, b, c, d = pairs.both, pairs.only_first, pairs.only_second, pairs.neither
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    if not margins:
        return 0.0
    excess = float(a * d - b * c)
    if excess > 0:
        excess = max(excess - pairs.number / 2, 0.0)
    return excess / math.sqrt(margins)
