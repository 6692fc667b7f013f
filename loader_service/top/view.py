"""The table that `loader-top` shows."""

from __future__ import annotations

import importlib
from typing import Any

from loader_service.top.fleet import FleetView, LoaderRow
from stoker_proto.errors import ConfigError

_SHOWN_STAGES = 3


def import_rich() -> Any:
    """The package rich, with what is used of it. Raises ConfigError where it is not installed."""
    try:
        for module in ("console", "live", "table", "text"):
            importlib.import_module(f"rich.{module}")
        return importlib.import_module("rich")
    except ImportError as error:
        raise ConfigError(
            "loader-top's table needs the package rich, which is not installed: pip install 'stoker[top]', or use --once --json"
        ) from error


def render(view: FleetView, rich: Any) -> Any:
    """What rich prints: loaders, trainers, what does not answer, and the verdicts."""
    table = rich.table.Table(title=f"loaders, last {view.window_s:.0f} s", title_justify="left", show_lines=True)
    for name in ("#", "address", "samples/s", "busy", "queue", "ranks"):
        table.add_column(name, justify="left" if name == "address" else "right", no_wrap=name != "address")
    table.add_column("stages of the busy time; host", ratio=1)
    for row in view.loaders:
        table.add_row(*_cells(row), style="red" if row.error else "" if row.is_ready else "yellow")
    lines = [table]
    for trainer in view.trainers:
        wait = "" if trainer.wait is None else f", waits for data {trainer.wait:.1%}"
        rate = "" if trainer.samples_per_s is None else f", {trainer.samples_per_s:.1f} samples/s"
        text = f"trainer {trainer.address}: {trainer.ranks} ranks, step {trainer.steps}{rate}{wait}, queue {trainer.queue_depth}"
        lines.append(rich.text.Text(text))
    lines += [rich.text.Text(f"{address}: no answer ({reason})", style="red") for address, reason in view.lost]
    lines += [rich.text.Text(verdict.text, style="bold") for verdict in view.verdicts]
    return rich.console.Group(*lines)


def _cells(row: LoaderRow) -> list[str]:
    if row.error:
        return [str(row.number), row.address, "-", "-", "-", "-", f"no answer ({row.error})"]
    stages = sorted(row.stages.items(), key=lambda item: -item[1])[:_SHOWN_STAGES]
    host = [
        "CPU -" if row.cpu_cores is None else f"CPU {row.cpu_cores:.2f}",
        f"memory {_size(row.memory_bytes)}",
        f"cache {_size(row.cache_bytes)} of {_size(row.cache_limit_bytes)}",
        *(() if row.cache_hits is None else (f"hits {row.cache_hits:.0%}",)),
    ]
    return [
        str(row.number),
        row.address if row.is_ready else f"{row.address} (drains)",
        "-" if row.samples_per_s is None else f"{row.samples_per_s:.1f}",
        "-" if row.busy is None else f"{row.busy:.0%}",
        str(row.queue),
        str(row.ranks),
        f"{', '.join(f'{stage} {share:.0%}' for stage, share in stages if share >= 0.01) or '-'}\n{', '.join(host)}",
    ]


def _size(count: float) -> str:
    return f"{count / 2**30:.1f}G" if count >= 2**30 else f"{count / 2**20:.0f}M"
