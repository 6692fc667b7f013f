"""A virtual environment for each peer, with pinned requirements, below the work folder."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
_LIMIT_S = 1800.0


@dataclass(frozen=True, kw_only=True)
class Environment:
    """An environment to run scripts in."""

    python: Path
    versions: dict[str, str]
    """Package -> version, of all that is installed there."""


class NotInstalled(Exception):
    """The reason, in one line."""


def own() -> Environment:
    """The environment that runs the harness: Stoker's."""
    return Environment(python=Path(sys.executable), versions=_versions(Path(sys.executable)))


def environment(folder: Path, name: str) -> Environment:
    """The environment of `requirements-NAME.txt`; made on the first call, and again when the requirements change.

    Raises NotInstalled.
    """
    requirements = HERE / f"requirements-{name}.txt"
    home, python = folder / f"env-{name}", folder / f"env-{name}" / "bin/python"
    stamp = hashlib.sha256(requirements.read_bytes()).hexdigest()
    done = home / "installed-requirements"
    if not done.exists() or done.read_text() != stamp:
        home.parent.mkdir(parents=True, exist_ok=True)
        _call([sys.executable, "-m", "venv", "--clear", str(home)])
        _call([str(python), "-m", "pip", "install", "--no-cache-dir", "-r", str(requirements)])
        done.write_text(stamp)
    return Environment(python=python, versions=_versions(python))


def _call(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise NotInstalled(f"pip needed more than {_LIMIT_S:.0f} s") from None
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        raise NotInstalled((errors or result.stderr.strip().splitlines() or ["pip failed"])[-1][:300])


def _versions(python: Path) -> dict[str, str]:
    command = [str(python), "-m", "pip", "list", "--format", "json"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return {package["name"].lower(): package["version"] for package in json.loads(listed.stdout)}
