"""Small charts as inline SVG: no script, no file, no request. Colours come from the page's style sheet."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

_WIDTH, _HEIGHT, _BINS = 260, 90, 32


def histogram(
    title: str, first: NDArray[np.float64], second: NDArray[np.float64] | None = None, *, unit: str = ""
) -> str:
    """Bars of `first`, and the outline of `second` over the same bins."""
    values = first if second is None else np.concatenate([first, second])
    low, high = float(values.min()), float(values.max())
    edges = np.linspace(low, high if high > low else low + 1.0, _BINS + 1)
    bars = np.histogram(first, edges)[0]
    outline = None if second is None else np.histogram(second, edges)[0]
    most = int(max(bars.max(), 0 if outline is None else outline.max(), 1))
    step = _WIDTH / _BINS
    parts = [
        f'<rect class="bar" x="{n * step:.1f}" y="{_HEIGHT - _tall(count, most):.1f}" width="{step - 1:.1f}" '
        f'height="{_tall(count, most):.1f}"><title>{edges[n]:.4g} to {edges[n + 1]:.4g}: {count}</title></rect>'
        for n, count in enumerate(bars.tolist())
        if count
    ]
    if outline is not None:
        points = " ".join(
            f"{x:.1f},{_HEIGHT - _tall(count, most):.1f}"
            for n, count in enumerate(outline.tolist())
            for x in (n * step, (n + 1) * step)
        )
        parts.append(f'<polyline class="outline" points="{points}"/>')
    return _figure(title, parts, f"{low:.4g}{unit}", f"{high:.4g}{unit}")


def counts(title: str, values: Sequence[int]) -> str:
    """One bar for each number, e.g. for each code; many numbers share a bar, whose height is their largest."""
    groups = np.array_split(np.asarray(values, np.int64), min(len(values), _WIDTH // 2))
    most, step = max(*values, 1), _WIDTH / max(len(groups), 1)
    parts, first = [], 0
    for n, group in enumerate(groups):
        tall, last = _tall(int(group.max()), most), first + len(group) - 1
        place = f"{first}" if last == first else f"{first} to {last}"
        if tall:
            parts.append(
                f'<rect class="bar" x="{n * step:.1f}" y="{_HEIGHT - tall:.1f}" width="{max(step - 0.5, 0.5):.1f}" '
                f'height="{tall:.1f}"><title>{place}: {int(group.sum())}</title></rect>'
            )
        first = last + 1
    return _figure(title, parts, "0", str(len(values) - 1))


def _tall(count: int, most: int) -> float:
    """At least one pixel where there is something."""
    return max(count / most * _HEIGHT, 1.0) if count else 0.0


def _figure(title: str, parts: Sequence[str], low: str, high: str) -> str:
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}" preserveAspectRatio="none">'
        f'{"".join(parts)}</svg><div class="axis"><span>{escape(low)}</span><span>{escape(high)}</span></div></figure>'
    )
