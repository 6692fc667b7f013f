"""The units as systemd itself reads them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from stoker_proto.config.reader import load_config

UNITS = Path(__file__).parent.parent.parent / "deploy" / "systemd"
NAMES = ("loader@.service", "trainer.service")

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed: the units are NOT verified"
)


def render(name: str, folder: Path, change: tuple[str, str] | None = None) -> Path:
    """The unit with programs and folders that exist here: verify looks for them."""
    text = (UNITS / name).read_text()
    if change is not None:
        assert change[0] in text
        text = text.replace(*change)
    program = shutil.which("true")
    assert program is not None
    text = re.sub(r"/opt/stoker/\.venv/bin/\S+", program, text)
    text = text.replace("WorkingDirectory=/opt/stoker", "WorkingDirectory=/")
    unit = folder / name
    unit.write_text(text)
    return unit


def verify(unit: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", "verify", "--recursive-errors=yes", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@needs_systemd
@pytest.mark.parametrize("name", NAMES)
def test_systemd_accepts_the_unit_without_a_word(name: str, tmp_path: Path) -> None:
    result = verify(render(name, tmp_path))
    assert (result.returncode, result.stderr) == (0, "")


@needs_systemd
def test_systemd_would_notice_a_mistyped_key(tmp_path: Path) -> None:
    result = verify(render("loader@.service", tmp_path, ("MemoryMax=", "MemoryMaximum=")))
    assert result.returncode != 0
    assert "MemoryMaximum" in result.stderr


@needs_systemd
@pytest.mark.parametrize(("name", "most"), [("loader@.service", 2.0), ("trainer.service", 4.0)])
def test_the_exposure_stays_low(name: str, most: float, tmp_path: Path) -> None:
    result = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(render(name, tmp_path))],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    match = re.search(r"Overall exposure level for \S+: ([\d.]+)", result.stdout)
    assert match is not None, result.stdout
    assert float(match[1]) <= most


@pytest.mark.parametrize("name", NAMES)
def test_the_unit_restarts_drains_and_is_bounded(name: str) -> None:
    keys = dict(re.findall(r"^(\w+)=(.*)$", (UNITS / name).read_text(), re.MULTILINE))
    assert keys["Restart"] == "on-failure"
    assert keys["KillSignal"] == "SIGTERM"
    assert keys["KillMode"] == "mixed"
    assert int(keys["TimeoutStopSec"]) >= 45, "longer than the drain that the program allows itself"
    assert keys["NoNewPrivileges"] == keys["PrivateTmp"] == "yes"
    assert keys["ProtectSystem"] == "strict"
    assert "MemoryMax" in keys
    assert "/srv/stoker" in keys["ReadOnlyPaths"]


def test_the_instance_names_the_config() -> None:
    text = (UNITS / "loader@.service").read_text()
    assert "--config /etc/stoker/%i.yaml" in text
    assert "EnvironmentFile=-/etc/stoker/loader-%i.env" in text


def test_each_variable_of_the_examples_is_used_by_its_unit() -> None:
    for example, unit in (("loader-maniskill.env.example", NAMES[0]), ("trainer.env.example", NAMES[1])):
        names = re.findall(r"^(\w+)=", (UNITS / example).read_text(), re.MULTILINE)
        assert names
        for name in names:
            assert re.search(rf"\$\{{?{name}\b", (UNITS / unit).read_text()), f"{unit} does not use {name}"


def test_the_example_arguments_split_at_blanks_into_an_override_that_is_read() -> None:
    match = re.search(r"^STOKER_ARGS=(.+)$", (UNITS / "trainer.env.example").read_text(), re.MULTILINE)
    assert match is not None
    flag, override = match[1].split()
    assert flag == "--set"
    config = load_config(UNITS.parent / "configs" / "maniskill_sft_openpi.yaml", [override])
    assert config.cluster.loader_addresses == ("tcp://127.0.0.1:5555",)
