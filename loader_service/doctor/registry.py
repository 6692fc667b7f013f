"""All checks by name, imported when they run."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable

from loader_service.doctor.facts import Examined
from loader_service.doctor.finding import Finding, of_error
from stoker_proto.errors import HostError, StokerError

_ROOM = "loader_service.doctor.checks"
CHECKS: dict[str, str] = {
    "disk_cache": f"{_ROOM}.host:disk_cache",
    "fingerprints": f"{_ROOM}.model:fingerprints",
    "round_trip": f"{_ROOM}.actions:round_trip",
    "dead_dimensions": f"{_ROOM}.actions:dead_dimensions",
    "clamped": f"{_ROOM}.actions:clamped",
    "unmasked_range": f"{_ROOM}.actions:unmasked_range",
    "gripper": f"{_ROOM}.actions:gripper",
    "saturated": f"{_ROOM}.actions:saturated",
    "short_episodes": f"{_ROOM}.episodes:short_episodes",
    "empty_episodes": f"{_ROOM}.episodes:empty_episodes",
    "duplicates": f"{_ROOM}.episodes:duplicates",
    "train_in_val": f"{_ROOM}.episodes:train_in_val",
    "jumps": f"{_ROOM}.episodes:jumps",
    "quaternions": f"{_ROOM}.episodes:quaternions",
    "still_episodes": f"{_ROOM}.episodes:still_episodes",
    "instructions": f"{_ROOM}.episodes:instructions",
    "constant_frames": f"{_ROOM}.frames:constant_frames",
    "frozen_frames": f"{_ROOM}.frames:frozen_frames",
    "frame_sizes": f"{_ROOM}.frames:frame_sizes",
    "camera_counts": f"{_ROOM}.frames:camera_counts",
    "empty_answers": f"{_ROOM}.text:empty_answers",
    "no_labels": f"{_ROOM}.text:no_labels",
    "stop_token": f"{_ROOM}.text:stop_token",
    "cut_dialogues": f"{_ROOM}.text:cut_dialogues",
    "long_rows": f"{_ROOM}.text:long_rows",
    "special_tokens": f"{_ROOM}.text:special_tokens",
    "imbalance": f"{_ROOM}.mixture:imbalance",
    "timestamps": f"{_ROOM}.lerobot:timestamps",
    "brief_episodes": f"{_ROOM}.lerobot:brief_episodes",
    "video_frames": f"{_ROOM}.lerobot:video_frames",
    "published_statistics": f"{_ROOM}.lerobot:published_statistics",
}
"""Name -> "module:function"; a function takes `Examined` and yields findings of its own name."""


def check(name: str) -> Callable[[Examined], Iterable[Finding]]:
    """The function of a name."""
    module, _, function = CHECKS[name].partition(":")
    found: Callable[[Examined], Iterable[Finding]] = getattr(importlib.import_module(module), function)
    return found


def run_checks(examined: Examined) -> list[Finding]:
    """Findings of all checks. A file that a check cannot read is a finding. Raises HostError."""
    findings: list[Finding] = []
    for name in CHECKS:
        try:
            findings.extend(check(name)(examined))
        except HostError:
            raise
        except StokerError as error:
            findings.append(of_error(error, name))
    return findings
