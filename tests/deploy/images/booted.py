"""A container in which systemd is process 1, on an overlay over this machine's own root folder: what it writes stays in memory.

It has this machine's systemd, and a network of its own without a way out. The checkout stands at /opt/stoker, as the units want
it, with an environment that is put together anew: Python and the packages may lie in a home folder, which the units hide.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.deploy.images.buildah import ROOT

_BOOT = """
set -eu
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
cp -a "$2/." "$1/root/"
chroot "$1/root" useradd --system --home-dir /var/lib/stoker stoker
exec systemd-nspawn --boot --directory="$1/root" --machine=stoker-test --register=no --keep-unit --private-network \
    --bind-ro="$3:/opt/stoker" --bind-ro="$1/root/opt/environment:/opt/stoker/.venv" \
    --bind-ro="$4:/opt/python" --bind-ro="$5:/opt/packages" --console=pipe -- --unit=basic.target
"""


def problem() -> str | None:
    """Why systemd cannot be started in a container here, and the way out; None if it can."""
    missing = [name for name in ("systemd-nspawn", "unshare", "nsenter", "useradd") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not found: apt-get install systemd-container util-linux passwd"
    if os.geteuid() != 0:
        return "a container needs root: run as root (sudo make test-images)"
    if Path(sys.prefix) != ROOT / ".venv":
        return f"the units start programs of {ROOT}/.venv, and this is {sys.prefix}: make test-images"
    return None


class Machine:
    """The container while it runs."""

    def __init__(self, first: int) -> None:
        self._first = first

    def run(self, *words: str, deadline_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run a command in it to the end, whatever its exit code."""
        return subprocess.run(
            ["nsenter", "--target", str(self._first), "--all", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=deadline_s,
            check=False,
        )

    def show(self, unit: str, name: str) -> str:
        """A property of a unit, as `systemctl show` prints it."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).stdout.strip()

    def journal(self, unit: str) -> str:
        """The end of what the unit and systemd about it have logged."""
        return self.run("journalctl", "--no-pager", "--lines=60", "--output=cat", f"--unit={unit}").stdout

    def wait_until(self, holds: Callable[[], bool], deadline_s: float, what: str, unit: str) -> None:
        """Look twice a second."""
        end = time.monotonic() + deadline_s
        while not holds():
            assert time.monotonic() < end, (
                f"{what}: not within {deadline_s:.0f} s\n{self.run('systemctl', 'status', unit).stdout}\n{self.journal(unit)}"
            )
            time.sleep(0.5)


@contextmanager
def booted(folder: Path, files: Path) -> Iterator[Machine]:
    """A machine that has started up to basic.target; it is shut down when the block ends.

    folder: empty, for its mounts and log; files: a tree that is copied into its root folder before it boots."""
    log, mounts = folder / "console.log", folder / "mounts"
    mounts.mkdir()
    _write_environment(files / "opt" / "environment")
    for name in ("python", "packages", "stoker"):
        (files / "opt" / name).mkdir()
    libraries = files / "etc" / "ld.so.conf.d"
    libraries.mkdir()
    (libraries / "python.conf").write_text("/opt/python/lib\n")
    places = (mounts, files, ROOT, sys.base_prefix, sysconfig.get_path("purelib"))
    with log.open("wb") as file:
        process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", _BOOT, "boot", *map(str, places)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        machine = Machine(_first_inside(process, log))
        machine.wait_until(
            lambda: machine.run("systemctl", "is-active", "basic.target").stdout == "active\n",
            120,
            "boot",
            "basic.target",
        )
        ldconfig = machine.run("/sbin/ldconfig")  # Python's own libpython has another path here
        assert ldconfig.returncode == 0, ldconfig.stderr
        yield machine
    finally:
        _end(process)


def _write_environment(folder: Path) -> None:
    """A virtual environment that looks for Python in /opt/python, and for modules in /opt/stoker and /opt/packages."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    packages.mkdir(parents=True)
    (packages / "stoker.pth").write_text("/opt/stoker\n/opt/stoker/proto\n/opt/packages\n")
    (folder / "pyvenv.cfg").write_text("home = /opt/python/bin\ninclude-system-site-packages = false\n")
    programs = folder / "bin"
    programs.mkdir()
    for name in ("python", "python3", version):
        (programs / name).symlink_to(f"/opt/python/bin/{version}")
    for script in (ROOT / ".venv" / "bin").iterdir():
        first, _, rest = script.read_bytes().partition(b"\n") if script.is_file() else (b"", b"", b"")
        if first == f"#!{sys.prefix}/bin/python".encode():
            (programs / script.name).write_bytes(b"#!/opt/stoker/.venv/bin/python\n" + rest)
            (programs / script.name).chmod(0o755)


def _first_inside(process: subprocess.Popen[bytes], log: Path, deadline_s: float = 120.0) -> int:
    """The process that is number 1 in the container, as this machine numbers it."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        for child in psutil.Process(process.pid).children(recursive=True):
            if _number_inside(child.pid) == 1 and Path(f"/proc/{child.pid}/comm").read_text() == "systemd\n":
                return child.pid
        time.sleep(0.2)
    raise AssertionError(f"systemd did not start in the container: {log.read_text(errors='replace')[-4000:]}")


def _number_inside(pid: int) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    numbers = next(line.split()[1:] for line in lines if line.startswith("NSpid:"))
    return int(numbers[-1]) if len(numbers) > 1 else None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask systemd to shut down (nspawn passes SIGTERM on as that), then kill what is left."""
    process.terminate()
    try:
        process.wait(120)
    except subprocess.TimeoutExpired:
        for child in reversed(psutil.Process(process.pid).children(recursive=True)):
            child.kill()
        process.kill()
        process.wait(30)
        raise
    finally:
        _remove_groups()


def _remove_groups() -> None:
    """Remove the control groups that nspawn leaves below the one of its caller."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kind, own = line.split(":", 2)
        for _, mount, file_system, options, *_ in mounts:
            if (file_system == "cgroup2" and not kind) or (file_system == "cgroup" and kind in options.split(",")):
                for name in ("payload", "supervisor"):
                    for folder, _, _ in os.walk(Path(mount) / own.lstrip("/") / name, topdown=False):
                        Path(folder).rmdir()
