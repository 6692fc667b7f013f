"""What compose.yaml and the Dockerfiles say, run for real: `make test-images`. It needs root and buildah, and takes minutes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.images.buildah import ROOT, Buildah
from tests.deploy.images.network import internal_network
from tests.deploy.images.services import Service, service_of
from tests.deploy.test_containers import resolved
from trainer.models.tiny import main as make_model

pytestmark = [pytest.mark.images, pytest.mark.timeout(7200)]

SHIPPED = ROOT / "deploy" / "configs" / "maniskill_sft_openpi.yaml"
DEMONSTRATIONS = ROOT / "tests" / "data" / "maniskill"
CACHED, COMMIT = "models--gen-robot--openvla-7b-rlvla-warmup", "0123456789abcdef0123456789abcdef01234567"
USER = 10001
HEALTHY_DEADLINE_S = 300.0
RUN_DEADLINE_S = 900.0
STOP_DEADLINE_S = 75.0
"""As stop_grace_period."""


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """Folders of a host, laid out as the shipped config names them: data/maniskill/{train,val}, outputs, and the model
    where `hf download --cache-dir models` puts it."""
    for split in ("train", "val"):
        folder = tmp_path / "data" / "maniskill" / split
        shutil.copytree(DEMONSTRATIONS / split, folder / split)
        shutil.copy(DEMONSTRATIONS / f"{split}.jsonl", folder)
    model = tmp_path / "models" / CACHED / "snapshots" / COMMIT
    assert make_model(["--family", "llava", "--out", str(model)]) == 0
    (model / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    refs = tmp_path / "models" / CACHED / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    (tmp_path / "outputs").mkdir()
    os.chown(tmp_path / "outputs", USER, USER)
    (tmp_path / "project").mkdir()
    tmp_path.chmod(0o755)
    return tmp_path


def variables(host: Path, **more: str) -> dict[str, str]:
    """What a user sets for Compose."""
    folders = {name: str(host / name) for name in ("data", "models", "outputs")}
    return {f"STOKER_{name.upper()}": path for name, path in folders.items()} | more


def small_config(host: Path) -> Path:
    """The shipped config with a run that two CPU ranks end soon."""
    tree = yaml.safe_load(SHIPPED.read_text())
    tree["cluster"]["component_placement"]["trainer"] = "0-1"
    tree["model"]["precision"] = "fp32"
    tree["trainer"] |= {"micro_batch_size": 4, "global_batch_size": 8, "max_steps": 4, "output_dir": "outputs/first"}
    tree["trainer"]["eval_interval"] = 4
    file = host / "small.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def services_of(stack: ExitStack, buildah: Buildah, host: Path, trees: Mapping[str, Any]) -> dict[str, Service]:
    """Each replica of each service, named SERVICE-NUMBER where there are several."""
    replicas = {
        name if tree.get("scale", 1) == 1 else f"{name}-{number}": tree
        for name, tree in trees.items()
        for number in range(1, tree.get("scale", 1) + 1)
    }
    aliases = {replica: name for name, tree in trees.items() for replica, other in replicas.items() if other is tree}
    network = stack.enter_context(internal_network(list(replicas), host, aliases))
    return {
        name: stack.enter_context(service_of(buildah, name, tree, network, host / "project"))
        for name, tree in replicas.items()
    }


def one_loader(host: Path, **more: str) -> dict[str, Any]:
    """The loader's service alone, once."""
    loader = resolved("cpu", **variables(host, **more))["services"]["loader"]
    return {"loader": {**loader, "scale": 1}}


def test_the_loader_checks_the_shipped_config_in_its_container(buildah: Buildah, host: Path) -> None:
    with ExitStack() as stack:
        (service,) = services_of(stack, buildah, host, one_loader(host)).values()
        result = service.container.run(*service.command, "--check")
        assert result.returncode == 0, result.stdout + result.stderr
        assert service.written() == []


def test_the_check_in_the_container_finds_a_model_that_is_not_there(buildah: Buildah, host: Path) -> None:
    (host / "models" / CACHED).rename(host / "models" / "other")
    with ExitStack() as stack:
        (service,) = services_of(stack, buildah, host, one_loader(host)).values()
        result = service.container.run(*service.command, "--check")
        assert result.returncode == 1
        assert "hf download gen-robot/openvla-7b-rlvla-warmup" in result.stderr


def test_a_file_that_a_command_leaves_outside_its_mounts_would_be_found(buildah: Buildah, host: Path) -> None:
    with ExitStack() as stack:
        (service,) = services_of(stack, buildah, host, one_loader(host)).values()
        assert service.container.run("touch", "/tmp/allowed", "/opt/stoker/job/left").returncode == 0
        assert service.written() == ["opt/stoker/job/left"]


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_the_whole_graph_trains_and_what_it_writes_belongs_to_its_user(
    buildah: Buildah, host: Path, profile: str
) -> None:
    trees = resolved(profile, **variables(host, STOKER_CONFIG=str(small_config(host))))["services"]
    (trainer_name,) = set(trees) - {"loader"}
    assert trees[trainer_name]["depends_on"]["loader"]["condition"] == "service_healthy"
    with ExitStack() as stack:
        services = services_of(stack, buildah, host, trees)
        loaders = [services["loader-1"], services["loader-2"]]
        for loader in loaders:
            loader.start()
        for loader in loaders:
            loader.wait_healthy(HEALTHY_DEADLINE_S)
        trainer = services[trainer_name]
        trainer.start()
        assert trainer.wait(RUN_DEADLINE_S) == 0, trainer.output()
        for loader in loaders:
            assert loader.stop(STOP_DEADLINE_S) == 0, loader.output()
        for service in services.values():
            assert service.written() == [], f"{service.name} writes where Compose mounts read-only"
    output = host / "outputs" / "first"
    assert json.loads((output / "summary.json").read_text())["steps"] == 4
    written = list(output.rglob("*"))
    assert any(path.suffix == ".safetensors" for path in written)
    assert {path.stat().st_uid for path in written} == {USER}
