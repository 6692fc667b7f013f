"""What `loader-prepare` prints: an aligned table of the entries, action statistics per dimension, the codec's report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from loader_service.manifest import EntryManifest
from loader_service.prepare.fit import train_actions
from loader_service.prepare.run import Prepared
from loader_service.prepare.statistics_check import statistics_findings
from stoker_proto.actions import ActionStatistics, CodecReport, codec_report
from stoker_proto.config import ActionConfig

_STATISTICS = ("min", "max", "mean", "std", "q01", "q99")


def report_of(prepared: Prepared, action: ActionConfig) -> CodecReport | None:
    """How well the codec does on the sample of the train actions that are here; None without a codec or without actions."""
    train = [entry for entry in prepared.entries.get("train", {}).values() if entry.statistics is not None]
    if prepared.codec is None or not train:
        return None
    return codec_report(prepared.codec, train_actions(train, action)[1])


def action_findings(prepared: Prepared, action: ActionConfig) -> list[str]:
    """How well the codec's statistics describe the train actions that are here, one line for each finding."""
    train = [entry for entry in prepared.entries.get("train", {}).values() if entry.statistics is not None]
    if prepared.codec is None or not train:
        return []
    own, sample = train_actions(train, action)
    return statistics_findings(prepared.codec, sample, own, action)


def summary_lines(prepared: Prepared, report: CodecReport | None, findings: Sequence[str] = ()) -> list[str]:
    """The text, line by line. findings: of the actions (`action_findings`)."""
    header = ("split", "entry", "shards", "records", "samples", "tokens", "bad", "fingerprint", "path")
    rows = [
        (
            split,
            str(number),
            f"{len(entry.shards):,}",
            f"{entry.num_records:,}",
            f"{entry.total_samples:,}",
            f"{_tokens(entry):,}" if _tokens(entry) else "-",
            f"{entry.num_bad:,}",
            entry.fingerprint[:12],
            entry.path,
        )
        for split, entries in prepared.entries.items()
        for number, entry in entries.items()
    ]
    lines = _table([header, *rows], left=(0, 7, 8))
    lines += [
        f"{split} {number}: {count:,} records: {note}"
        for split, entries in prepared.entries.items()
        for number, entry in entries.items()
        for note, count in entry.notes.items()
    ]
    if prepared.statistics is None:
        return [*lines, "", "no actions: no action codec"]
    lines += ["", f"actions of the codec's fit: {prepared.statistics.count:,}"]
    lines += _statistics_table(prepared.statistics)
    lines += findings
    if report is not None:
        lines += ["", *report.format().splitlines()]
    if prepared.codec is not None:
        lines += [f"codec fingerprint {prepared.codec.fingerprint[:12]}"]
    return lines


def summary_tree(prepared: Prepared, report: CodecReport | None, findings: Sequence[str] = ()) -> dict[str, Any]:
    """The same for programs (`--json`)."""
    codec = prepared.codec
    tree: dict[str, Any] = {
        "entries": [
            {
                "split": split,
                "entry": number,
                "path": entry.path,
                "shards": len(entry.shards),
                "records": entry.num_records,
                "samples": entry.total_samples,
                "tokens": _tokens(entry),
                "bad_records": entry.num_bad,
                "notes": dict(entry.notes),
                "fingerprint": entry.fingerprint,
            }
            for split, entries in prepared.entries.items()
            for number, entry in entries.items()
        ],
        "statistics": None if prepared.statistics is None else prepared.statistics.to_json(),
        "codec": None,
        "findings": [*prepared.findings, *findings],
    }
    if codec is not None:
        tree["codec"] = {"name": codec.name, "chunk": codec.chunk, "fingerprint": codec.fingerprint}
        if report is not None:
            tree["codec"] |= {
                "tokens_per_action": report.tokens_per_action,
                "most_tokens_per_chunk": report.most_tokens,
                "max_tokens_per_chunk": report.max_tokens,
                "clamped": report.clamped,
                "mean_abs_error": report.mean_abs_error.tolist(),
                "rms_error": report.rms_error.tolist(),
                "max_abs_error": report.max_abs_error.tolist(),
                "code_use": report.code_use.tolist(),
            }
    return tree


def _tokens(entry: EntryManifest) -> int:
    """Of all its samples; 0 where nobody counted them."""
    return int(entry.num_tokens.sum(dtype=np.int64))


def _statistics_table(statistics: ActionStatistics) -> list[str]:
    rows: list[tuple[str, ...]] = [("dimension", *_STATISTICS, "normalised")]
    for d in range(statistics.dim):
        numbers = [f"{getattr(statistics, name)[d]:.6f}" for name in _STATISTICS]
        rows.append((str(d), *numbers, "yes" if statistics.mask[d] else "no"))
    return _table(rows, left=())


def _table(rows: list[tuple[str, ...]], left: tuple[int, ...]) -> list[str]:
    """Columns of equal width; those in `left` are aligned to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
