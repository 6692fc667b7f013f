"""One data set, two loaders and the undisturbed run's digests for all faults; the longest gaps are listed at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.end_to_end.faults.crew import Crew
from tests.end_to_end.fleet import Pulled, pull, run_cli, write_config, write_demonstrations
from tests.support.slowness import slowness

_GAP = "longest wait of a step, in seconds"
"""A property of a test: it reaches the terminal from pytest-xdist's processes too."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the trainer felt of each fault."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    gaps = [(report, dict(report.user_properties)) for report in reports if report.when == "call"]
    gaps = [(report, properties[_GAP]) for report, properties in gaps if _GAP in properties]
    if gaps:
        terminalreporter.section("longest time that the trainer waited for one step")
        for report, seconds in gaps:
            terminalreporter.write_line(f"{seconds:7.2f} s  {report.nodeid.rpartition('::')[2]}")


@dataclass(frozen=True)
class Arena:
    """What a run is compared with."""

    config: Path
    expected: Pulled
    """Without any fault."""


@pytest.fixture(scope="session")
def arena(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Arena]:
    """60 trajectories of 3 to 16 timesteps, prepared, and what an epoch of them is."""
    folder = tmp_path_factory.mktemp("faults")
    jsonl = write_demonstrations(folder / "demos", [3 + 5 * i % 14 for i in range(60)], size=64)
    config = write_config(folder, model, [jsonl])
    assert run_cli("prepare", "--config", str(config)).returncode == 0
    with Crew(config, 1) as crew:
        yield Arena(config, pull(config, crew.addresses))


@pytest.fixture(scope="session")
def shared_crew(arena: Arena) -> Iterator[Crew]:
    """Two loaders."""
    with Crew(arena.config, 2) as crew:
        yield crew


@pytest.fixture
def crew(shared_crew: Crew) -> Crew:
    """The two, well at the start of each test."""
    shared_crew.all_well()
    return shared_crew


@pytest.fixture
def check_run(arena: Arena, request: pytest.FixtureRequest) -> Callable[[Pulled, float], None]:
    """The run was the undisturbed one, and no step was waited for longer than this on a quiet machine."""
    before = slowness()

    def check(pulled: Pulled, most_s: float) -> None:
        request.node.user_properties.append((_GAP, pulled.longest_wait_s))
        assert pulled.keys == arena.expected.keys
        assert pulled.steps == arena.expected.steps
        assert pulled.longest_wait_s < most_s * max(before, slowness())

    return check
