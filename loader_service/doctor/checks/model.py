"""What the rows depend on: fingerprints, for a comparison between runs and hosts."""

from __future__ import annotations

from collections.abc import Iterator

from loader_service.doctor.facts import Examined
from loader_service.doctor.finding import Finding

_SHOWN = ("tokenizer", "image", "dialogue", "codec", "state")


def fingerprints(examined: Examined) -> Iterator[Finding]:
    """Note: fingerprints of codec, template and tokenizer. Loaders and trainer of one run have equal ones."""
    if examined.processor is not None:
        found = examined.processor.fingerprints()
        shown = ", ".join(f"{name} {found[name][:12]}" for name in _SHOWN if found[name] != "none")
        yield Finding("note", "fingerprints", "", "", shown, "")
