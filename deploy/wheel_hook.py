"""Puts this folder into the wheel as the package `stoker_deploy`: in a user's environment another package may have the name
`deploy`.

hatchling runs it (`tool.hatch.build.hooks.custom` in pyproject.toml).

    in the checkout            in the wheel
    deploy/launch.py           stoker_deploy/launch.py        `from deploy.child import say` -> `from stoker_deploy.child ...`
    deploy/configs/*.yaml      stoker_deploy/configs/*.yaml   and the units, the Compose file, the runbook: as they are
    demo.py, success.py        not there: they need the repository's tests and data

An editable install gets a package without files of its own, `stoker_deploy`, that looks for its modules here.
"""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SHIPPED = ("*.py", "*.md", "*.yaml", "constraints.txt", "Dockerfile.*", "*.service", "*.env.example", "*.sbatch")
"""Never `deploy/.env`, which a user may have made for the Compose file."""
LEFT_OUT = ("demo.py", "success.py", "wheel_hook.py")
_OWN_NAME = re.compile(r"(?<=from )deploy(?=[. ])|(?<=^import )deploy\b|(?<=[\"'])deploy(?=\.\w)", re.MULTILINE)
"""The package's name in an import, and at the start of a module's name in quotes (`python -m`)."""
_EDITABLE = '''"""The checkout's `deploy`, by the name that it has in the wheel."""

import deploy

__path__ = deploy.__path__
'''


class StokerDeployHook(BuildHookInterface[Any]):
    """hatchling calls `initialize` before it writes a wheel, and `finalize` after that."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """version: `standard` or `editable`."""
        self._made = TemporaryDirectory()
        package = Path(self._made.name, "stoker_deploy")
        if version == "editable":
            package.mkdir()
            (package / "__init__.py").write_text(_EDITABLE, encoding="utf-8")
        else:
            copy_renamed(Path(self.root, "deploy"), package)
        build_data["force_include"][str(package)] = "stoker_deploy"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """The wheel is written."""
        self._made.cleanup()


def copy_renamed(source: Path, target: Path) -> None:
    """Copy what ships from the package `deploy` to a package with the name of `target`."""
    for file in sorted({file for pattern in SHIPPED for file in source.rglob(pattern)}):
        inside = file.relative_to(source)
        if str(inside) in LEFT_OUT or "__pycache__" in inside.parts:
            continue
        text = file.read_text(encoding="utf-8")
        (target / inside).parent.mkdir(parents=True, exist_ok=True)
        (target / inside).write_text(
            _OWN_NAME.sub(target.name, text) if file.suffix == ".py" else text, encoding="utf-8"
        )
