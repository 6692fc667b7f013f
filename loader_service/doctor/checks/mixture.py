"""The sources of a mixture against each other."""

from __future__ import annotations

from collections.abc import Iterator

from loader_service.doctor.facts import Examined
from loader_service.doctor.finding import Finding

_RATIO = 100


def imbalance(examined: Examined) -> Iterator[Finding]:
    """Note: sources without weights of which one has over a hundred times as many samples as another, or repeats as often."""
    data = examined.config.data
    names = data.source_names()
    sizes = dict.fromkeys(range(len(names)), 0)
    for entry in examined.entries:
        if entry.split == "train" and entry.manifest is not None:
            sizes[entry.source] += entry.manifest.total_samples
    found = {number: size for number, size in sizes.items() if size}
    if len(found) < 2:
        return
    if data.weights and data.weigh_by == "samples":
        passes = {number: data.weights[number] / size for number, size in found.items()}  # in an epoch, up to a factor
        few, many = min(passes, key=passes.__getitem__), max(passes, key=passes.__getitem__)
        if passes[many] > _RATIO * passes[few]:
            problem = (
                f"by their weights {names[many]} ({found[many]:,} samples) repeats {passes[many] / passes[few]:.0f} times while "
                f"{names[few]} ({found[few]:,} samples) is read once"
            )
            yield Finding("note", "imbalance", "data.sources", "", problem, "check the weights")
        return
    small, large = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
    if not data.weights and found[large] > _RATIO * found[small]:
        problem = f"{names[large]} has {found[large]:,} samples and {names[small]} {found[small]:,}"
        way_out = "give the sources weights, if the small one shall be noticed"
        yield Finding("note", "imbalance", "data.sources", "", problem, way_out)
