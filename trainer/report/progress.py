"""Progress of a run: the live bar and the summary."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm


class ProgressBar:
    """A bar of the steps, with loss, step time and data wait; only the first rank shows it."""

    def __init__(self, *, total: int, done: int, shown: bool) -> None:
        pause_s = 0.5 if sys.stderr.isatty() else 15.0  # a log file gets a line every 15 s
        self._bar = tqdm(
            total=total,
            initial=done,
            disable=not shown,
            unit="step",
            desc="train",
            mininterval=pause_s,
            dynamic_ncols=True,
        )

    def advance(self, *, loss: float, step_s: float, wait_s: float) -> None:
        """One more step is done."""
        self._bar.set_postfix(
            {"loss": f"{loss:.4f}", "step": f"{step_s:.2f}s", "data wait": f"{wait_s:.2f}s"}, refresh=False
        )
        self._bar.update()

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._bar.close()


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write one line of JSON; infinity and NaN become null."""
    path.write_text(json.dumps(finite(summary)) + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """The value with every infinity and NaN replaced by None, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(item) for item in value]
    return value
