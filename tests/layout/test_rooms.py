"""The rooms of the design: which folder may import which, no circles, and maps that name files that exist."""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
ROOMS: Mapping[str, Sequence[str]] = {
    "stoker_proto": (
        *(
            "errors",
            "hashing",
            "arguments",
            "host",
            "fleet",
            "model_folder",
            "config",
            "actions",
            "wire",
            "images",
            "text",
            "order",
            "processor",
            "run_record",
        ),
    ),
    "loader_service": (
        *(
            "paths",
            "shards",
            "cache_folder",
            "manifest",
            "disk_cache",
            "remote",
            "sources",
            "plan",
            "pieces",
            "prepare",
        ),
        *("server", "inspection", "replay", "doctor", "top", "convert", "cli"),
    ),
    "trainer": (
        *("process", "feed.client", "feed", "engine", "models", "losses", "training", "evals", "checkpoints"),
        *("report", "bench", "loop", "build", "policy_io", "policy_loading", "policy_chunks", "policy_options"),
        *("policy", "serving", "plan", "sim", "check", "cli", "main", "examples"),
    ),
}
"""Rooms (folders, and files beside them) of each package, lowest first: a room imports itself and those before it only."""
FOLDERS = {
    "stoker_proto": ROOT / "proto" / "stoker_proto",
    "loader_service": ROOT / "loader_service",
    "trainer": ROOT / "trainer",
}
PACKAGES = {**FOLDERS, "deploy": ROOT / "deploy"}
MAPS = ("loader_service/README.md", "trainer/README.md", "proto/README.md")


def modules(package: str, folder: Path) -> dict[str, Path]:
    """Dotted name -> file, of every module below `folder` that is not an `__init__`."""
    names = {}
    for file in sorted(folder.rglob("*.py")):
        if file.name != "__init__.py":
            names[".".join((package, *file.relative_to(folder).with_suffix("").parts))] = file
    return names


def imports(file: Path, known: Mapping[str, Path], inits: Mapping[str, Path], *, lazy: bool) -> Iterator[str]:
    """Modules of the same package that `file` imports; a name that a folder's `__init__` re-exports counts as its module.

    Imports below a function or below `TYPE_CHECKING` count with `lazy` only: they decide direction, not circles at start.
    """
    for node in _import_statements(file.read_text(), lazy):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in known:
                    yield full
                elif node.module in known:
                    yield node.module
                elif node.module in inits:
                    yield from _re_exported(inits[node.module], alias.name, known)


@cache
def _import_statements(source: str, lazy: bool) -> list[ast.Import | ast.ImportFrom]:
    tree = ast.parse(source)
    nodes = ast.walk(tree) if lazy else tree.body
    return [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]


def _re_exported(init: Path, name: str, known: Mapping[str, Path]) -> Iterator[str]:
    for node in _import_statements(init.read_text(), False):
        if isinstance(node, ast.ImportFrom) and node.module in known and any(a.name == name for a in node.names):
            yield str(node.module)


def graph(package: str, folder: Path, *, lazy: bool) -> dict[str, set[str]]:
    """Module -> the modules of the same package that it imports."""
    known = modules(package, folder)
    inits = {".".join((package, *file.parent.relative_to(folder).parts)): file for file in folder.rglob("__init__.py")}
    return {name: set(imports(file, known, inits, lazy=lazy)) - {name} for name, file in known.items()}


def circle(edges: Mapping[str, set[str]]) -> list[str]:
    """The names of one circle, in order; empty where there is none."""
    state: dict[str, int] = {}
    path: list[str] = []

    def visit(name: str) -> list[str]:
        state[name] = 1
        path.append(name)
        for after in sorted(edges.get(name, ())):
            if state.get(after) == 1:
                return [*path[path.index(after) :], after]
            if after not in state and (found := visit(after)):
                return found
        path.pop()
        state[name] = 2
        return []

    for name in sorted(edges):
        if name not in state and (found := visit(name)):
            return found
    return []


def room_of(module: str, rooms: Sequence[str]) -> str:
    """The longest room that the module lies in. Raises ValueError for a module in no room."""
    inside = module.partition(".")[2]
    fitting = [room for room in rooms if inside == room or inside.startswith(room + ".")]
    if not fitting:
        raise ValueError(f"{module} lies in no room: give it one, in ROOMS of this test and in the design's own list")
    return max(fitting, key=len)


def upward(edges: Mapping[str, set[str]], rooms: Sequence[str]) -> list[str]:
    """`importer -> imported` for every import of a room that stands above the importer's."""
    return [
        f"{name} -> {other}"
        for name, others in sorted(edges.items())
        for other in sorted(others)
        if rooms.index(room_of(other, rooms)) > rooms.index(room_of(name, rooms))
    ]


@pytest.mark.long
@pytest.mark.parametrize("package", FOLDERS)
def test_no_room_imports_one_above_it(package: str) -> None:
    assert upward(graph(package, FOLDERS[package], lazy=True), ROOMS[package]) == []


@pytest.mark.parametrize("package", FOLDERS)
def test_no_circle_of_files(package: str) -> None:
    assert circle(graph(package, FOLDERS[package], lazy=True)) == []


def reading(init: Path) -> str:
    """The part of a folder's docstring that says in which order to read its files."""
    text = ast.get_docstring(ast.parse(init.read_text())) or ""
    found = re.search(r"\bRead\s.*", text, re.S)
    return found[0] if found else ""


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_says_what_comes_in_and_what_goes_out(package: str) -> None:
    for folder in {file.parent for file in PACKAGES[package].rglob("*.py")}:
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
        assert re.search(r"\bIn: ", text), f"{folder}/__init__.py does not say what comes in"
        assert re.search(r"\bOut: ", text), f"{folder}/__init__.py does not say what goes out"
        assert reading(folder / "__init__.py"), f"{folder}/__init__.py does not say in which order to read its files"


@pytest.mark.parametrize("package", PACKAGES)
def test_an_init_names_every_file_of_its_folder_and_no_other(package: str) -> None:
    for init in PACKAGES[package].rglob("__init__.py"):
        files = {file.stem for file in init.parent.glob("*.py")} - {"__init__", "__main__"}
        there = files | {inner.parent.name for inner in init.parent.glob("*/__init__.py")}
        assert set(re.findall(r"`([a-z][a-z0-9_]*)`", reading(init))) == there, init


@pytest.mark.parametrize("page", MAPS)
def test_every_file_that_a_map_names_exists(page: str) -> None:
    named = set(re.findall(r"`([\w/]+\.(?:py|md|yaml))`", (ROOT / page).read_text()))
    assert len(named) >= 10, f"{page} is no map"
    folder = (ROOT / page).parent
    places = (ROOT, folder, ROOT / "proto", ROOT / "proto" / "stoker_proto")
    # A name without a folder stands in a sentence that names the folder.
    missing = sorted(
        name
        for name in named
        if not any((place / name).exists() for place in places) and ("/" in name or not any(folder.rglob(name)))
    )
    assert missing == []


def test_an_import_upwards_is_caught(tmp_path: Path) -> None:
    (tmp_path / "low").mkdir()
    (tmp_path / "high").mkdir()
    (tmp_path / "low" / "__init__.py").write_text("")
    (tmp_path / "high" / "__init__.py").write_text("from p.high.b import thing\n")
    (tmp_path / "high" / "b.py").write_text("thing = 1\n")
    (tmp_path / "low" / "a.py").write_text("def f():\n    from p.high import thing\n")
    edges = graph("p", tmp_path, lazy=True)
    assert upward(edges, ("low", "high")) == ["p.low.a -> p.high.b"]
    assert upward(edges, ("high", "low")) == []
    with pytest.raises(ValueError, match=r"p\.low\.a lies in no room"):
        upward(edges, ("high",))


def test_a_circle_is_caught() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
