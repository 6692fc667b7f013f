"""Figures of all rounds -> medians with ranges, a table as text or markdown, a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Mapping[str, Mapping[str, Any]]
"""Name of a row -> `summary`, or `{"reason": why it has no figures}`."""

COLUMNS = (
    ("first epoch: CPU ms/sample", "cpu_ms", "{:.2f}"),
    ("of it the consumer", "consumer_cpu_ms", "{:.2f}"),
    ("second epoch", "second_epoch_cpu_ms", "{:.2f}"),
    ("of it the consumer", "second_epoch_consumer_cpu_ms", "{:.2f}"),
    ("second run", "second_run_cpu_ms", "{:.2f}"),
    ("samples/s", "samples_per_s", "{:.0f}"),
    ("start to ready, s", "ready_s", "{:.1f}"),
    ("CPU s", "ready_cpu_s", "{:.1f}"),
    ("ready to first batch, s", "first_batch_s", "{:.2f}"),
    ("peak MB", "peak_mb", "{:.0f}"),
)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians of the figures that the rounds have; what is not a number comes from `facts`."""
    names = [name for name, value in rounds[0].items() if isinstance(value, float)]
    kinds = sorted({kind for figures in rounds for kind in figures["kinds_cpu_ms"]})
    return {
        **{name: spread([figures[name] for figures in rounds]) for name in names},
        "kinds_cpu_ms": {kind: spread([r["kinds_cpu_ms"].get(kind, 0.0) for r in rounds]) for kind in kinds},
        "same_order": len({figures[key] for figures in rounds for key in ("order", "order_again")}) == 1,
        "exact": all(figures["samples"] == figures["distinct"] == figures["expected"] for figures in rounds),
        "resumes": _resumes(rounds),
        "rounds": len(rounds),
    }


def _resumes(rounds: Sequence[Mapping[str, Any]]) -> bool:
    """Did each resumed run give what the runs from the beginning gave there?"""
    return len({figures[key] for figures in rounds for key in ("order_of_second_half", "resumed_order")}) == 1


def table(rows: Rows, *, markdown: bool) -> str:
    """One line per row; a median, and the range where it is wider than the last digit."""
    head = ["", *(title for title, _, _ in COLUMNS), "resume at half: s, CPU s", "same order"]
    lines = [head]
    for name, row in rows.items():
        if "reason" in row:
            lines.append([name, row["reason"], *[""] * (len(head) - 2)])
            continue
        cells = [_cell(row[key], form) for _, key, form in COLUMNS]
        resume = (
            f"{_cell(row['resume_s'], '{:.2f}')}, {_cell(row['resume_cpu_s'], '{:.2f}')}" if row["resumes"] else "no"
        )
        order = "yes" if row["same_order"] else "no"
        lines.append([name, *cells, resume, order if row["exact"] else "samples lost or doubled"])
    if markdown:
        return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines[1:]])
    return _aligned(lines)


def _cell(figure: Mapping[str, float], form: str) -> str:
    low, middle, high = (form.format(figure[key]) for key in ("min", "median", "max"))
    return middle if low == high else f"{middle} ({low}-{high})"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Rows become blocks: a terminal is not wide enough for all columns."""
    head, *rows = lines
    blocks = []
    for row in rows:
        pairs = [f"  {title:<28}{cell}" for title, cell in zip(head[1:], row[1:], strict=True) if cell]
        reason = len([cell for cell in row[1:] if cell]) == 1
        blocks.append("\n".join([row[0], f"  {row[1]}"] if reason else [row[0], *pairs]))
    return "\n".join(blocks)


def plot(tables: Mapping[str, Rows], picture: Path, caption: str) -> None:
    """One panel per data set: CPU ms per sample of the first epoch by kind of process, and a mark for the second epoch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = [max(sum("reason" not in row for row in rows.values()), 1) for rows in tables.values()]
    figure, axes = pyplot.subplots(
        len(tables), 1, figsize=(8, 0.38 * sum(sizes) + 1.1 * len(tables) + 0.5), squeeze=False, height_ratios=sizes
    )  # fmt: skip
    for axis, (title, rows) in zip(axes[:, 0], tables.items(), strict=True):
        _panel(axis, title, {name: row for name, row in rows.items() if "reason" not in row})
    key = "Blue: loading. Orange: the consumer; Stoker's also decodes the JPEGs. Black line: the second epoch."
    figure.text(0.01, 0.008, f"{key}\n{caption}", fontsize=7, color="0.3")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


_COLOURS = {"workers": "#4878a8", "loader": "#4878a8", "server": "#4878a8", "daemons": "#9ab7d3", "consumer": "#e0a458"}


def _panel(axis: Any, title: str, rows: Rows) -> None:
    totals = sorted(row["cpu_ms"]["median"] for row in rows.values())
    limit = 1.15 * max((total for total in totals if total <= 8 * totals[0]), default=1.0)  # longer bars are cut
    for place, row in enumerate(rows.values()):
        left = 0.0
        for kind, cost in sorted(row["kinds_cpu_ms"].items(), key=lambda item: item[0] == "consumer"):
            width = min(cost["median"], limit - left)
            axis.barh(place, width, left=left, height=0.65, color=_COLOURS.get(kind, "#9ab7d3"))
            left += width
        total, second = row["cpu_ms"]["median"], row["second_epoch_cpu_ms"]["median"]
        label = f"{total:.2f}" if total < limit else f"{total:.1f} (cut)"
        right = min(max(total, second if second < limit else 0.0), limit)
        axis.text(right + 0.01 * limit, place, label, va="center", fontsize=8)
        if second < limit:
            axis.plot([second, second], [place - 0.33, place + 0.33], color="black", linewidth=2)
    axis.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.18 * limit)
    axis.tick_params(axis="x", labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(f"{title}: CPU ms per sample", fontsize=9, loc="left")
