"""What the simulator tests share: the skip where there is no simulator, and running the collector as a user does."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
DEADLINE_S = 900

Collector = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="session")
def collector() -> Collector:
    """Starts `python -m trainer.sim.collect ARGUMENTS...` in a process group of its own."""

    def start(*arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "trainer.sim.collect", *map(str, arguments)],
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "proto")])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.fixture(scope="session")
def simulator(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips the test, saying why, where ManiSkill is missing or cannot draw."""
    if importlib.util.find_spec("mani_skill") is None:
        pytest.skip("SIMULATOR NOT TESTED: mani_skill is not installed; pip install -e '.[sim]'")
    # In a process of its own, since a broken graphics driver may crash instead of raising.
    out = tmp_path_factory.mktemp("probe") / "out"
    process = collector("--task", "PushCube-v1", "--num", 1, "--image-size", 8, "--out", out, "--quiet")
    _, errors = process.communicate(timeout=DEADLINE_S)
    if process.returncode:
        last_line = (errors.strip().splitlines() or ["no message"])[-1]
        if "install_renderer.sh" in last_line:
            pytest.skip(f"SIMULATOR NOT TESTED: {last_line}")
        pytest.fail(f"the collector fails, and not for want of a renderer:\n{errors}")
