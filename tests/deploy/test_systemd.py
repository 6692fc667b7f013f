"""The units as systemd itself reads them."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from deploy import launch
from loader_service.server.health import STALLED_S
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
    assert float(match[1]) < most


def test_a_loader_is_ready_when_it_says_so_and_is_watched() -> None:
    keys = keys_of("loader@.service")
    assert (keys["Type"], keys["NotifyAccess"]) == ("notify", "main")
    # The loop's own limit for /livez comes first, and a host without free CPU is no hang.
    assert int(keys["WatchdogSec"]) / 2 >= STALLED_S
    assert keys["TimeoutStartSec"] == "12h"


@needs_systemd
def test_systemd_accepts_the_drop_in_with_keys(tmp_path: Path) -> None:
    unit = render("loader@.service", tmp_path)
    drop_in = tmp_path / "loader@.service.d" / "keys.conf"
    drop_in.parent.mkdir()
    shutil.copy(UNITS / "loader@.service.d" / "keys.conf", drop_in)
    assert "LoadCredential=loader.key_secret:/etc/stoker/loader.key_secret" in drop_in.read_text()
    result = verify(unit)
    assert (result.returncode, result.stderr) == (0, "")
    drop_in.write_text(drop_in.read_text().replace("LoadCredential=", "LoadCredentials="))
    assert "LoadCredentials" in verify(unit).stderr


@pytest.mark.parametrize("name", NAMES)
def test_the_unit_restarts_drains_and_is_bounded(name: str) -> None:
    keys = keys_of(name)
    assert keys["Restart"] == "on-failure"
    assert keys["KillSignal"] == "SIGTERM"
    assert keys["KillMode"] == "mixed"
    assert int(keys["TimeoutStopSec"]) >= 45, "longer than the drain that the program allows itself"
    assert keys["NoNewPrivileges"] == keys["PrivateTmp"] == "yes"
    assert keys["ProtectSystem"] == "strict"
    assert "MemoryMax" in keys
    assert "/srv/stoker" in keys["ReadOnlyPaths"]


def keys_of(name: str) -> dict[str, str]:
    """The unit's settings; of a key that is there twice, the last."""
    return dict(re.findall(r"^(\w+)=(.*)$", (UNITS / name).read_text(), re.MULTILINE))


def command_line(setting: str, variables: dict[str, str]) -> list[str]:
    """The words of an Exec setting as systemd makes them: `${NAME}` is one word or part of one, `$NAME` is split at blanks."""
    words = []
    for word in shlex.split(setting):
        if word.startswith("$") and word[1:] in variables:
            words += variables[word[1:]].split()
        else:
            words.append(re.sub(r"\$\{(\w+)\}", lambda match: variables[match[1]], word).replace("$$", "$"))
    return words


@pytest.mark.parametrize(("more", "expected"), [("", 3600.0), ("--set trainer.feed.connect_deadline_s=7200", 7200.0)])
def test_the_trainer_waits_for_a_first_prepare_and_waiting_never_uses_up_its_starts(more: str, expected: float) -> None:
    keys = keys_of("trainer.service")
    words = command_line(keys["ExecStart"], {"STOKER_CONFIG": "maniskill", "STOKER_ARGS": more})
    options = launch.parse_arguments(words[2:])
    assert options.no_loaders
    config = load_config(UNITS.parent / "configs" / "maniskill_sft_openpi.yaml", options.set)
    assert config.trainer.output_dir == "/var/lib/stoker/maniskill"
    assert config.trainer.feed.connect_deadline_s == expected
    num_starts = int(keys["StartLimitIntervalSec"]) / (expected + int(keys["RestartSec"]))
    assert num_starts < int(keys["StartLimitBurst"])


def check_of_instance(variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The loader's ExecStartPre, run as systemd would run it for the instance `second`."""
    words = command_line(keys_of("loader@.service")["ExecStartPre"].replace("%i", "second"), {})
    return subprocess.run(words, env=variables, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("variables", [{}, {"STOKER_BIND": ""}], ids=["no file", "empty"])
def test_an_instance_without_an_address_of_its_own_is_refused_with_the_way_out(variables: dict[str, str]) -> None:
    """A default port would be shared by all instances."""
    assert not re.search(r"^Environment=STOKER_BIND=.", (UNITS / "loader@.service").read_text(), re.MULTILINE)
    result = check_of_instance(variables)
    assert result.returncode == 78
    assert result.stderr.startswith("loader@second: /etc/stoker/loader-second.env does not set STOKER_BIND: copy ")


def test_an_instance_with_an_address_is_started_on_it() -> None:
    variables = {"STOKER_BIND": "tcp://127.0.0.1:5556"}
    result = check_of_instance(variables)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    variables |= {"STOKER_ARGS": "", "CACHE_DIRECTORY": "/var/cache/stoker/second"}
    words = command_line(keys_of("loader@.service")["ExecStart"].replace("%i", "second"), variables)
    assert words[words.index("--bind") + 1 :] == ["tcp://127.0.0.1:5556"]


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
