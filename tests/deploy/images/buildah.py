"""Images built and run without a daemon: buildah in its chroot isolation, on a base image that debootstrap makes here.

Everything lies in one folder: the base image and the storage of all images. No registry is used: a minimal Debian with Debian's
Python is committed under the name that the Dockerfiles ask for. pip in a build uses this machine's configuration.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[3]
BASE_IMAGE = "docker.io/library/python:3.11-slim-bookworm"
_PACKAGES = "python3,python3-venv,ca-certificates,passwd"
_FREE_BYTES = 25 << 30  # a build holds the trainer's environment several times: stage, copy, layer
_BUILD_DEADLINE_S = 3600.0
_CALL_DEADLINE_S = 600.0
_CERTIFICATES = "/etc/ssl/certs"


def problem(folder: Path) -> str | None:
    """Why images cannot be built here, and the way out; None if they can."""
    missing = [name for name in ("buildah", "debootstrap", "ip") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not found: apt-get install buildah debootstrap iproute2"
    if os.geteuid() != 0:
        return "buildah's chroot isolation needs root: run as root (sudo make test-images)"
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if free < _FREE_BYTES:
        return f"{folder} has {free >> 30} GB free, needed: {_FREE_BYTES >> 30} GB (STOKER_IMAGES names another folder)"
    return None


class Buildah:
    """buildah with a storage of its own below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("storage", "run", "tmp"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.environment = {**os.environ, "BUILDAH_ISOLATION": "chroot", "TMPDIR": str(folder / "tmp")}
        self.driver = "overlay"
        try:
            self.call("info")
        except RuntimeError:  # as inside a container, where overlays cannot be stacked
            self.driver = "vfs"
            self.call("info")

    def command(self, *words: str) -> list[str]:
        """The command line of a buildah command on this storage."""
        folders = ("--root", str(self.folder / "storage"), "--runroot", str(self.folder / "run"))
        return ["buildah", *folders, "--storage-driver", self.driver, *words]

    def call(self, *words: str, deadline_s: float = _CALL_DEADLINE_S) -> str:
        """Its stdout. Raises RuntimeError with the end of its output where it fails."""
        return _call(self.command(*words), self.environment, deadline_s)

    def make_base(self) -> None:
        """A minimal Debian with Python under the name that the Dockerfiles ask for; made once per storage."""
        if BASE_IMAGE in self.call("images", "--format", "{{.Name}}:{{.Tag}}").split():
            return
        context = self.folder / "base"
        shutil.rmtree(context, ignore_errors=True)
        context.mkdir()
        rootfs = str(context / "rootfs")
        bootstrap = ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", "bookworm", rootfs]
        _call(bootstrap, self.environment, _BUILD_DEADLINE_S)
        file = context / "Dockerfile"
        file.write_text('FROM scratch\nCOPY rootfs /\nRUN ln -s python3 /usr/bin/python\nCMD ["python3"]\n')
        self.call("bud", "-f", str(file), "-t", BASE_IMAGE, str(context))
        shutil.rmtree(context)

    def build(self, dockerfile: str, tag: str, arguments: Mapping[str, str]) -> None:
        """Build from the repository's root; `dockerfile` is relative to it."""
        options = ["--format", "docker", "--pull-never", "--network", "host"]  # the other format drops HEALTHCHECK
        for name, value in arguments.items():
            options += ["--build-arg", f"{name}={value}"]
        for mount in self._pip_mounts():
            options += ["-v", mount]
        self.call("bud", *options, "-f", str(ROOT / dockerfile), "-t", tag, str(ROOT), deadline_s=_BUILD_DEADLINE_S)
        self.remove_untagged()

    def remove_untagged(self) -> None:
        """Drop the images that a newer build of the same name has replaced: each is a full copy on the disk."""
        for line in self.call("images", "--format", "{{.ID}} {{.Name}}").splitlines():
            number, _, name = line.partition(" ")
            if name == "<none>":
                self.call("rmi", "-f", number)

    def image_config(self, tag: str) -> dict[str, Any]:
        """The image's Entrypoint, Cmd, User, WorkingDir, Env, Healthcheck as Docker stores them."""
        config = json.loads(self.call("inspect", "--type", "image", tag))["Docker"]["config"]
        assert isinstance(config, dict)
        return config

    def container(self, tag: str) -> Container:
        """A container of the image; nothing runs in it yet."""
        name = self.call("from", "--pull-never", tag).strip()
        return Container(self, name, Path(self.call("mount", name).strip()))

    def _pip_mounts(self) -> Iterator[str]:
        """This machine's pip configuration as one file, and the local files that it names."""
        values = pip_configuration()
        file = self.folder / "pip.conf"
        file.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in values.items()))
        yield f"{file}:/etc/pip.conf:ro"
        yield f"{_CERTIFICATES}:{_CERTIFICATES}:ro"
        for path in sorted({path for value in values.values() for path in local_paths(value)}):
            if not path.is_relative_to(_CERTIFICATES):
                yield f"{path}:{path}:ro"


@dataclass
class Container:
    """A container's root folder and the commands that run in it."""

    buildah: Buildah
    name: str
    root: Path
    """Its root folder as it lies on this machine."""
    prefix: Sequence[str] = ()
    """Put before buildah, for example to enter a network namespace."""
    options: list[str] = field(default_factory=list)
    """Of each `buildah run`: user, mounts, environment."""

    def command(self, *words: str) -> list[str]:
        """The command line that runs `words` in the container."""
        return [*self.prefix, *self.buildah.command("run", *self.options, self.name, "--", *words)]

    def run(self, *words: str, deadline_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run to the end, whatever its exit code."""
        return subprocess.run(
            self.command(*words),
            env=self.buildah.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=deadline_s,
            check=False,
        )

    def remove(self) -> None:
        """Drop the container and what was written in it."""
        self.buildah.call("rm", self.name)


def pip_configuration() -> dict[str, str]:
    """What pip of this Python is configured with, from its files and the environment; the environment wins, as in pip."""
    answer = _call([sys.executable, "-m", "pip", "config", "list"], os.environ, 60.0)
    values, from_environment = {}, {}
    for line in answer.splitlines():
        name, _, quoted = line.partition("=")
        section, _, key = name.rpartition(".")
        chosen = from_environment if section == ":env:" else values
        if section in (":env:", "global", "install"):
            chosen[key] = " ".join(str(ast.literal_eval(quoted)).split())
    return values | from_environment


def local_paths(value: str) -> Iterator[Path]:
    """Folders and files of this machine among the words of a setting."""
    for word in value.split():
        url = urlsplit(word)
        if url.scheme == "file":
            path = Path(url.path)
            yield path.parent if path.parent != Path("/") else path  # an index's files may lie beside it
        elif word.startswith("/") and Path(word).exists():
            yield Path(word)


def _call(command: Sequence[str], environment: Mapping[str, str], deadline_s: float) -> str:
    result = subprocess.run(
        list(command),
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=deadline_s,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(
            f"{' '.join(command)}: exit code {result.returncode}:\n{(result.stdout + result.stderr)[-8000:]}"
        )
    return result.stdout
