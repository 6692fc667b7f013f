"""One thing that the doctor found.

Finding("warning", "dead_dimension", "demos/", "action[3]", "the value is 0 in all 250 actions", "remove the dimension, or ...")
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from stoker_proto.errors import DataError, StokerError
from stoker_proto.host.trouble import check_host

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""The worst first."""
_LFS = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found, and what to do about it."""

    severity: Severity
    """`error`: training would fail, or learn something else than the data says. `warning`: probably a fault of the data.
    `note`: worth knowing."""
    check: str
    """Name of the check in the registry, or of the stage that failed."""
    file: str
    """The file, folder or config key; "" where the finding concerns all data."""
    where: str
    """Record, dimension, camera or field; "" where there is none."""
    problem: str
    """The value, and the rule that it breaks."""
    way_out: str
    """"" where `problem` says it already (errors of prepare and of the sources)."""

    def line(self) -> str:
        """For people, one line."""
        place = ", ".join(part for part in (self.file, self.where) if part)
        way_out = f"; {self.way_out}" if self.way_out else ""
        return f"{self.severity:7}  {self.check}: {place + ': ' if place else ''}{self.problem}{way_out}"


def of_error(error: StokerError, check: str, file: str = "") -> Finding:
    """An error that prepare, a source or the processor raised, with its own text; file: where the error names none."""
    if not isinstance(error, DataError):
        return Finding("error", check, file, "", str(error), "")
    check_host(error, file)
    where = ", ".join(part for part in (error.record and f"record {error.record}", error.field) if part)
    found = error.file or file
    pointer = "fetch the file itself with `git lfs pull`" if is_lfs_pointer(Path(found)) else ""
    reason = f"a Git LFS pointer, not the data ({error.reason})" if pointer else error.reason
    return Finding("error", check, found, where, reason, pointer)


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file is the text that Git LFS leaves in the place of a file that was not fetched. False for no file."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(_LFS)) == _LFS


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Each once, the worst first, else in the order in which they came."""
    return sorted(dict.fromkeys(findings), key=lambda finding: SEVERITIES.index(finding.severity))


def exit_code(findings: Sequence[Finding], *, strict: bool) -> int:
    """0: clean; 1: errors; 2: warnings, with `strict`."""
    found = {finding.severity for finding in findings}
    if "error" in found:
        return 1
    return 2 if strict and "warning" in found else 0


def report_lines(findings: Sequence[Finding], read: Mapping[str, int]) -> Iterator[str]:
    """For people. read: what was read -> how many."""
    yield from (finding.line() for finding in findings)
    counts = Counter(finding.severity for finding in findings)
    what = ", ".join(f"{count:,} {name}" for name, count in read.items())
    yield f"{counts['error']} errors, {counts['warning']} warnings, {counts['note']} notes; read: {what}"


def report_json(findings: Sequence[Finding], read: Mapping[str, int], *, strict: bool) -> str:
    """For programs: one line."""
    tree: dict[str, Any] = {
        "exit_code": exit_code(findings, strict=strict),
        "read": dict(read),
        "findings": [asdict(finding) for finding in findings],
    }
    return json.dumps(tree)
