"""The services of compose.yaml as Compose resolves them, run by buildah with the same command, user, environment and mounts.

Not imitated: the limits on memory and processes, `init`, restarts, the devices of the `gpu` profile. The root folder is
writable under buildah and read-only under Compose; `written` finds what a command wrote there.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.deploy.images.buildah import Buildah, Container
from tests.deploy.images.network import Network

_IGNORED = ("dev", "proc", "sys", "run", "etc/hosts", "etc/hostname", "etc/resolv.conf")
"""What buildah itself puts into a container."""


@dataclass
class Service:
    """A service's container; `process` runs its command once `start` was called."""

    name: str
    tree: Mapping[str, Any]
    """The service in the output of `docker compose config`."""
    config: Mapping[str, Any]
    """Its image's config."""
    container: Container
    log: Path
    made_at: float
    process: subprocess.Popen[bytes] | None = None

    @property
    def entrypoint(self) -> list[str]:
        """The first words of its command."""
        return list(self.tree.get("entrypoint") or self.config["Entrypoint"])

    @property
    def command(self) -> list[str]:
        """The whole command line, as Docker joins it."""
        return [*self.entrypoint, *(self.tree.get("command") or self.config["Cmd"])]

    def start(self) -> None:
        """Run the command in the background; its output goes to `log`."""
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                self.container.command(*self.command),
                env=self.container.buildah.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def is_healthy(self) -> bool:
        """Run the service's health check once, or the image's own where it has none."""
        check = self.tree.get("healthcheck")
        kind, *words = check["test"] if check else self.config["Healthcheck"]["Test"]
        assert kind == "CMD"
        return self.container.run(*words).returncode == 0

    def wait_healthy(self, deadline_s: float) -> None:
        """Run the health check until it passes."""
        end = time.monotonic() + deadline_s
        while not self.is_healthy():
            assert self.process is not None
            assert self.process.poll() is None, f"{self.name} has ended: {self.output()}"
            assert time.monotonic() < end, f"{self.name} is not healthy after {deadline_s} s: {self.output()}"
            time.sleep(0.5)

    def wait(self, deadline_s: float) -> int:
        """Its exit code."""
        assert self.process is not None
        return self.process.wait(deadline_s)

    def stop(self, deadline_s: float) -> int:
        """Send SIGTERM to the first process of the container, as Docker does; its exit code."""
        assert self.process is not None
        first = next(iter(self._inside()), None)
        if first is not None:
            first.terminate()
        return self.process.wait(deadline_s)

    def kill(self) -> None:
        """End everything that is left of it."""
        for process in reversed(self._inside()):
            process.kill()
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)

    def output(self) -> str:
        """The end of what it printed."""
        return self.log.read_text(errors="replace")[-6000:]

    def written(self) -> list[str]:
        """Files in the container's root folder that are newer than the container, mounts left out."""
        targets = {mount["target"].lstrip("/") for mount in self.tree["volumes"]} | {"tmp", *_IGNORED}
        found = []
        for folder, folders, files in os.walk(self.container.root):
            relative = Path(folder).relative_to(self.container.root)
            folders[:] = [name for name in folders if str(relative / name) not in targets]
            for name in files:
                path = Path(folder) / name
                if str(relative / name) not in targets and path.lstat().st_mtime > self.made_at:
                    found.append(str(relative / name))
        return found

    def _inside(self) -> list[psutil.Process]:
        """Processes that run in the container, the first one first."""
        if self.process is None or self.process.poll() is not None:
            return []
        processes = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in processes if "buildah" not in Path(process.exe()).name]


@contextmanager
def service_of(
    buildah: Buildah, name: str, tree: Mapping[str, Any], network: Network, folder: Path
) -> Iterator[Service]:
    """The service's container with what Compose gives it. folder: of this project's named volumes and logs."""
    image = tree["image"]
    container = buildah.container(image)
    container.prefix = network.prefix(name)
    service = Service(name, tree, buildah.image_config(image), container, folder / f"{name}.log", time.time())
    container.options = [
        *("--cap-drop", "ALL"),
        *("--user", tree.get("user") or service.config["User"]),
        *("--workingdir", tree.get("working_dir") or service.config["WorkingDir"]),
        "--no-hosts",
        *("-v", f"{network.hosts[name]}:/etc/hosts:ro"),
    ]
    assert tree["cap_drop"] == ["ALL"]
    for key, value in (tree.get("environment") or {}).items():
        container.options += ["-e", f"{key}={value}"]
    for mount in tree["volumes"]:
        source = mount["source"] if mount["type"] == "bind" else named_volume(container, mount, folder)
        container.options += ["-v", f"{source}:{mount['target']}:{'ro' if mount.get('read_only') else 'rw'}"]
    for number, target in enumerate(tree["tmpfs"]):
        temporary = folder / f"{name}-tmpfs{number}"
        temporary.mkdir()
        temporary.chmod(0o1777)
        container.options += ["-v", f"{temporary}:{target.partition(':')[0]}:rw"]
    try:
        yield service
    finally:
        service.kill()
        container.remove()


def named_volume(container: Container, mount: Mapping[str, Any], folder: Path) -> Path:
    """The folder behind a named volume. As in Docker, a new one has the owner of the image's folder at that place."""
    path = folder / f"volume-{mount['source']}"
    if not path.exists():
        status = (container.root / mount["target"].lstrip("/")).stat()
        path.mkdir()
        os.chown(path, status.st_uid, status.st_gid)
    return path
