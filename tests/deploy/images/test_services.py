"""The units under a real systemd, as the runbook installs them. It takes minutes, most of them the watchdog's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from loader_service.server.keys import main as make_keys
from tests.deploy.images.booted import Machine, booted, problem
from tests.deploy.images.buildah import ROOT
from trainer.models.tiny import main as make_model

pytestmark = [pytest.mark.images, pytest.mark.timeout(3600)]

LOADER = "loader@demo.service"
READY_DEADLINE_S = 300.0
RUN_DEADLINE_S = 900.0


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """What is added to the root folder: units, /etc/stoker with keys, data and model in /srv/stoker.

    Skips where no container with systemd can be started."""
    if (reason := problem()) is not None:
        pytest.skip(f"the units are NOT run under systemd: {reason}")
    root = tmp_path / "files"
    etc, srv = root / "etc" / "stoker", root / "srv" / "stoker"
    shutil.copytree(ROOT / "deploy" / "systemd", root / "etc" / "systemd" / "system")
    for folder in (etc / "allowed", srv):
        folder.mkdir(parents=True)
    shutil.copytree(ROOT / "tests" / "data" / "pushcube", srv / "pushcube", ignore=shutil.ignore_patterns(".stoker"))
    model = srv / "policy"
    assert make_model(["--family", "robot", "--image-size", "72", "--num-views", "1", "--out", str(model)]) == 0
    (model / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    for name in ("loader", "rank"):
        make_keys(["--out", str(etc), "--name", name])
    (etc / "rank.key").rename(etc / "allowed" / "rank.key")
    (etc / "demo.yaml").write_text(yaml.safe_dump(config()))
    (etc / "loader-demo.env").write_text("STOKER_BIND=tcp://127.0.0.1:5555\nSTOKER_ARGS=--health 127.0.0.1:5580\n")
    (etc / "trainer.env").write_text("STOKER_CONFIG=demo\nSTOKER_ARGS=--set trainer.max_steps=4\n")
    return root


def config() -> dict[str, object]:
    """The demo's config with the paths and keys of a host that runs services; only one rank, so that it is quick."""
    tree = yaml.safe_load((ROOT / "deploy" / "configs" / "demo.yaml").read_text())
    tree["cluster"] |= {
        "component_placement": {"trainer": "0", "dataloader": "0"},
        "loader_addresses": ["tcp://127.0.0.1:5555"],
        "security": {
            "loader_secret": f"/run/credentials/{LOADER}/loader.key_secret",
            "allowed_ranks": ["/etc/stoker/allowed"],
            "rank_secret": "/etc/stoker/rank.key_secret",
            "loader_key": "/etc/stoker/loader.key",
        },
    }
    tree["model"]["base_model_path"] = "/srv/stoker/policy"
    tree["data"] |= {f"{split}_data_paths": [f"/srv/stoker/pushcube/{split}.jsonl"] for split in ("train", "val")}
    del tree["data"]["cache_dir"]
    tree["trainer"] |= {"micro_batch_size": 8, "global_batch_size": 16}
    assert isinstance(tree, dict)
    return tree


@pytest.fixture
def machine(tmp_path: Path, files: Path) -> Iterator[Machine]:
    """Booted, with the trainer's secret in its user's hands."""
    folder = tmp_path / "machine"
    folder.mkdir()
    with booted(folder, files) as machine:
        assert machine.run("chown", "stoker", "/etc/stoker/rank.key_secret").returncode == 0
        yield machine


def is_ready(machine: Machine) -> bool:
    """Whether the loader takes tickets, asked as a probe asks."""
    words = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:5580/readyz', timeout=2)"
    return machine.run("/opt/stoker/.venv/bin/python", "-c", words).returncode == 0


def test_a_loader_is_watched_and_restarted_and_a_trainer_ends_its_run(machine: Machine) -> None:
    assert machine.run("systemctl", "start", "loader@other").returncode == 1
    assert "loader@other: /etc/stoker/loader-other.env does not set STOKER_BIND" in machine.journal("loader@other")
    assert machine.run("systemctl", "stop", "loader@other").returncode == 0, "else it is tried ten times"

    started = machine.run("systemctl", "start", LOADER, deadline_s=READY_DEADLINE_S)
    assert started.returncode == 0, started.stderr + machine.journal(LOADER)
    # Type=notify: `start` returns once the loader has said READY=1, so it serves now.
    assert machine.show(LOADER, "ActiveState") == "active"
    assert machine.show(LOADER, "StatusText") == "serving at tcp://127.0.0.1:5555"
    assert is_ready(machine)
    first = machine.show(LOADER, "MainPID")
    assert machine.run("stat", "--format=%U", f"/proc/{first}").stdout.strip() not in ("root", "stoker"), "DynamicUser"

    assert machine.run("systemctl", "kill", "--kill-whom=main", "--signal=STOP", LOADER).returncode == 0
    machine.wait_until(lambda: machine.show(LOADER, "NRestarts") == "1", 300, "the watchdog's restart", LOADER)
    machine.wait_until(lambda: machine.show(LOADER, "ActiveState") == "active", READY_DEADLINE_S, "a new start", LOADER)
    assert "Watchdog timeout (limit 1min)!" in machine.journal(LOADER)
    assert machine.show(LOADER, "MainPID") not in (first, "0")
    assert is_ready(machine)

    started = machine.run("systemctl", "start", "trainer")
    assert started.returncode == 0, started.stderr + machine.journal("trainer")
    machine.wait_until(
        lambda: machine.show("trainer", "ActiveState") not in ("active", "activating"),
        RUN_DEADLINE_S,
        "a run",
        "trainer",
    )
    assert (machine.show("trainer", "Result"), machine.show("trainer", "NRestarts")) == ("success", "0"), (
        machine.journal("trainer")
    )
    summary = machine.run("cat", "/var/lib/stoker/demo/summary.json")
    assert json.loads(summary.stdout)["steps"] == 4
    assert machine.run("stat", "--format=%U", "/var/lib/stoker/demo/summary.json").stdout == "stoker\n"

    assert machine.show(LOADER, "NRestarts") == "1"
    assert machine.run("systemctl", "stop", LOADER).returncode == 0
    assert (machine.show(LOADER, "ActiveState"), machine.show(LOADER, "Result")) == ("inactive", "success")
