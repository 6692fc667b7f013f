"""Who may import whom. Each rule is also shown to catch a breach, on a small tree made for it."""

import ast
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGES = {
    "stoker_proto": ROOT / "proto" / "stoker_proto",
    "loader_service": ROOT / "loader_service",
    "trainer": ROOT / "trainer",
    "deploy": ROOT / "deploy",
}
ALLOWED_AT_THE_GROUND = frozenset(
    {
        *("stoker_proto", "numpy", "msgpack", "yaml", "simplejpeg", "pybase64", "xxhash"),
        *("tokenizers", "cykooz_resizer", "PIL", "jinja2"),
        "prometheus_client",  # an extra, imported where metrics are asked for
    }
)
"""What stoker_proto may import beside the standard library: never torch, zmq or transformers."""
FORBIDDEN = {
    "loader_service": {"trainer", "deploy", "tests", "torch", "transformers", "deepspeed", "accelerate"},
    "trainer": {"loader_service", "deploy", "tests"},
    "deploy": {"loader_service", "trainer", "tests", "torch", "deepspeed"},
}

OPTIONAL = {"loader_service/pieces/device_images.py": "torch"}
"""File -> the forbidden package that it imports where its user asked for it (`loader.device`)."""


@cache
def imported_modules(source: str) -> list[tuple[int, str]]:
    """(line, dotted name) of every import, wherever it stands, also through importlib with a literal name."""
    return list(_imported_modules(source))


def _imported_modules(source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def breaches(packages: Mapping[str, Path]) -> list[str]:
    """`file:line: why` for each import that breaks a rule."""
    found = []
    for package, folder in packages.items():
        for file in sorted(folder.rglob("*.py")):
            for line, module in imported_modules(file.read_text(encoding="utf-8")):
                top = module.partition(".")[0]
                if module.startswith("."):
                    reason = "imports are absolute"
                elif package == "stoker_proto" and top not in ALLOWED_AT_THE_GROUND | sys.stdlib_module_names:
                    reason = f"stoker_proto stands at the ground and may not import {module}"
                elif top in FORBIDDEN.get(package, ()) and not any(
                    file.as_posix().endswith(name) and top == optional for name, optional in OPTIONAL.items()
                ):
                    reason = f"{package} may not import {module}"
                else:
                    continue
                found.append(f"{file}:{line}: {reason}")
    return found


@pytest.mark.long
def test_imports_keep_their_direction() -> None:
    for folder in PACKAGES.values():
        assert list(folder.rglob("*.py")), f"{folder} holds no code: is the layout another one now?"
    assert breaches(PACKAGES) == []


@pytest.mark.parametrize(
    ("package", "statement"),
    [
        ("stoker_proto", "import torch"),
        ("stoker_proto", "from zmq.utils import z85"),
        ("stoker_proto", "from loader_service import plan"),
        ("stoker_proto", "from . import errors"),
        ("loader_service", "from trainer.feed import feed"),
        ("loader_service", "def f():\n    import torch.nn"),
        ("loader_service", "import importlib\nimportlib.import_module('transformers')"),
        ("trainer", "from loader_service.plan.record_plan import Plan"),
        ("trainer", "from deploy import launch"),
        ("trainer", "import tests.data"),
        ("deploy", "from trainer.cli import parse_arguments"),
    ],
)
def test_a_breach_is_caught(package: str, statement: str, tmp_path: Path) -> None:
    file = tmp_path / package / "inner" / "module.py"
    file.parent.mkdir(parents=True)
    file.write_text(f"import json\n{statement}\n")
    found = breaches({package: tmp_path / package})
    assert len(found) == 1
    assert found[0].startswith(f"{file}:")


def test_what_is_allowed_is_not_caught(tmp_path: Path) -> None:
    for package, statement in (
        ("stoker_proto", "import json, msgpack, PIL.Image\nfrom stoker_proto.errors import ConfigError"),
        (
            "loader_service",
            "import zmq\nfrom stoker_proto.order.lanes import Order\nfrom loader_service.plan.record_plan import Plan",
        ),
        ("trainer", "import torch\nfrom stoker_proto.order.lanes import Order\nfrom trainer.feed import feed"),
    ):
        (tmp_path / package).mkdir()
        (tmp_path / package / "module.py").write_text(statement + "\n")
    assert breaches({name: tmp_path / name for name in ("stoker_proto", "loader_service", "trainer")}) == []
