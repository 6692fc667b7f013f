"""The collector's command line and the renderer's installer, as far as they go without a simulator."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from trainer.sim.collect import main
from trainer.sim.environment import TASKS, Environment, SimulatorUnavailableError

INSTALLER = Path(__file__).resolve().parents[3] / "trainer" / "sim" / "install_renderer.sh"


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for needed in (*TASKS, "obs_path", "install_renderer.sh", "stoker[sim]", "Ctrl-C", "examples:"):
        assert needed in text


def test_existing_set_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    assert main(["--task", "PushCube-v1", "--out", str(tmp_path)]) == 1
    jsonl = tmp_path / "train.jsonl"
    assert capsys.readouterr().err == (
        f"collect: {jsonl} exists and is not overwritten; remove it or choose another --out or --name\n"
    )
    assert jsonl.read_text() == "{}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num", "0"], "--num: 0: 1 or more"),
        (["--processes", "-1"], "--processes: -1: 1 or more"),
        (["--image-size", "big"], "--image-size: 'big': a whole number is expected"),
        (["--noise", "1.5"], "--noise: 1.5: 0 to 1 is expected"),
        (["--render-share", "nan"], "--render-share: nan: 0 to 1 is expected"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--task", "PushCube-v1", "--out", "unused", *arguments])
    assert exit_info.value.code == 2
    assert said in capsys.readouterr().err


def test_missing_maniskill_names_the_extra_and_the_installer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(SimulatorUnavailableError, match=r"stoker\[sim\].*trainer/sim/install_renderer\.sh"):
        Environment("PushCube-v1")


def test_missing_renderer_names_the_installer(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*_: object, **__: object) -> None:
        raise RuntimeError("failed to find a rendering device")

    for name in ("gymnasium", "mani_skill", "mani_skill.envs", "mani_skill.utils", "mani_skill.utils.sapien_utils"):
        module = ModuleType(name)
        vars(module).update(make=make, look_at=lambda eye, target: None)
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(
        SimulatorUnavailableError, match=r"failed to find a rendering device.*install_renderer\.sh"
    ) as info:
        Environment("PushCube-v1")
    assert "\n" not in str(info.value)


@pytest.mark.process
@pytest.mark.skipif(shutil.which("dpkg") is None, reason="the installer's check compares versions with dpkg (Debian)")
@pytest.mark.parametrize(
    ("installed", "python", "exit_code", "message"),
    [
        ("22.3.6-1+deb12u1", 0, 1, "is '22.3.6-1+deb12u1', needed: 24.3"),
        ("25.0.7-2~bpo12+1", 3, 3, "chosen-python has no sapien, so no picture was drawn"),
        ("25.0.7-2~bpo12+1", 1, 1, "sapien in chosen-python could not draw"),
        ("25.0.7-2~bpo12+1", 0, 0, "chosen-python drew a picture"),
        ("", 0, 1, "is ''"),
    ],
)
def test_installer_check_changes_nothing_and_succeeds_only_with_a_picture(
    tmp_path: Path, installed: str, python: int, exit_code: int, message: str
) -> None:
    """python: exit code of the Python that is to draw."""
    fakes = {
        "dpkg-query": f"echo 'ii  {installed}'" if installed else "exit 1",
        "chosen-python": f"exit {python}",
        "apt-get": f"touch {tmp_path}/apt-get-was-run",
    }
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    result = subprocess.run(
        ["sh", str(INSTALLER), "--check"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "STOKER_PYTHON": "chosen-python"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == exit_code
    assert message in result.stdout + result.stderr
    assert not (tmp_path / "apt-get-was-run").exists()
