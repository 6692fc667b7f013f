"""torch's profiler over some steps (`trainer.profile`), on the first rank.

{output_dir}/profile/steps-10-13.json    a trace: open it in Perfetto or chrome://tracing
{output_dir}/profile/steps-10-13.txt     operators by their own time
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from stoker_proto.config import ProfileConfig

log = logging.getLogger(__name__)
_TABLE_ROWS = 40


class StepProfiler:
    """Call `before_step` and `after_step` around each step, and `close` at the end."""

    def __init__(self, config: ProfileConfig | None, folder: Path, *, is_first: bool) -> None:
        """folder: `output_dir`."""
        self._config = config if is_first else None
        self._folder = folder / "profile"
        self._profile: Any = None

    def before_step(self, step: int) -> None:
        """step: counted from 1. Starts at the first one that is asked for, also where a resume begins behind it."""
        config = self._config
        if config is not None and self._profile is None and config.start <= step < config.stop:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(activities=activities, profile_memory=True)
            self._first = step
            self._profile.start()

    def after_step(self, step: int) -> None:
        """Writes the files after the last step."""
        if self._profile is not None and self._config is not None and step + 1 >= self._config.stop:
            self._write(step + 1)

    def close(self, step: int) -> None:
        """The run ends after `step`: write what was recorded."""
        if self._profile is not None:
            self._write(step + 1)

    def _write(self, stop: int) -> None:
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / f"steps-{self._first}-{stop}.json"
        self._profile.export_chrome_trace(str(trace))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = self._profile.key_averages().table(sort_by=by, row_limit=_TABLE_ROWS)
        trace.with_suffix(".txt").write_text(table, encoding="utf-8")
        log.info(
            "steps %d to %d are profiled: %s (open it in Perfetto), %s",
            self._first,
            stop - 1,
            trace,
            f"{trace.stem}.txt",
        )
        self._profile = self._config = None
