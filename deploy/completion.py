"""Whether a run is complete, by its own record. An exit code of 0 does not prove it.

DeepSpeed's runner exits with 0 when the launcher that it started is killed, for memory perhaps. The trainer writes
`summary.json` in its output_dir as the last act of a complete run, also when it resumes a run that was complete already.
"""

from __future__ import annotations

import json
from pathlib import Path

Stamp = tuple[int, int, int] | None


class CompletionRecord:
    """Create it before the trainer starts, so that the record of an earlier run does not count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._before = _stamp(path)

    def is_written(self) -> bool:
        """Whether the whole record was written since this object was made. Raises OSError where it cannot be read."""
        if _stamp(self.path) in (None, self._before):
            return False
        try:
            json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError:  # cut off in the middle
            return False
        return True


def _stamp(path: Path) -> Stamp:
    """Changes whenever the file is written."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
