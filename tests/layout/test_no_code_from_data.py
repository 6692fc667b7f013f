"""Nothing that comes from a network or a dataset may execute: the calls that would do it do not occur."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.layout.test_imports import imported_modules

ROOT = Path(__file__).parent.parent.parent
FOLDERS = (ROOT / "proto" / "stoker_proto", ROOT / "loader_service", ROOT / "trainer", ROOT / "deploy")
MAY_UNPICKLE = ROOT / "loader_service" / "convert" / "pickled.py"
"""The converter of pickled episodes, which wants a flag on the command line; no loader and no trainer imports it."""
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
CALLS = {
    "eval": "eval runs text as code",
    "exec": "exec runs text as code",
    "yaml.load": "use yaml.safe_load",
    "yaml.load_all": "use yaml.safe_load_all",
    "yaml.full_load": "use yaml.safe_load",
    "yaml.unsafe_load": "use yaml.safe_load",
    "os.system": "use subprocess with a list",
    "os.popen": "use subprocess with a list",
}
LOADERS_WITH_WEIGHTS_ONLY = {"torch.load"}
REASONS_BY_KEYWORD = {
    "allow_pickle": "unpickling executes code",
    "shell": "a shell interprets text",
    "trust_remote_code": "only the config's model.trust_remote_code may say so",
}


def dangers(source: str) -> list[tuple[int, str]]:
    """(line, reason) of everything that could execute what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [(node.lineno, f"{name} executes code") for name in names if name.partition(".")[0] in MODULES]
        elif isinstance(node, ast.Call):
            found += [(node.lineno, reason) for reason in _dangers_of_call(node)]
    return found


def _dangers_of_call(call: ast.Call) -> list[str]:
    name, found = _dotted(call.func), []
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if name in CALLS:
        found.append(CALLS[name])
    if name in LOADERS_WITH_WEIGHTS_ONLY and not _is_constant(keywords.get("weights_only"), True):
        found.append(f"{name} unpickles without weights_only=True")
    for keyword, reason in REASONS_BY_KEYWORD.items():
        if _is_constant(keywords.get(keyword), True):
            found.append(f"{keyword}=True: {reason}")
    return found


def _dotted(node: ast.expr) -> str:
    """`yaml.load` for the expression of that name; "" for what is no name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := _dotted(node.value)):
        return f"{before}.{node.attr}"
    return ""


def _is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.long
def test_nothing_that_is_read_can_execute() -> None:
    found = [
        f"{file}:{line}: {reason}"
        for folder in FOLDERS
        for file in sorted(folder.rglob("*.py"))
        for line, reason in dangers(file.read_text(encoding="utf-8"))
        if (file, reason) != (MAY_UNPICKLE, "pickle executes code")
    ]
    assert found == []


@pytest.mark.long
def test_only_its_own_format_imports_what_unpickles() -> None:
    importers = [
        (file.relative_to(ROOT).as_posix(), module)
        for folder in FOLDERS
        for file in sorted(folder.rglob("*.py"))
        for _, module in imported_modules(file.read_text(encoding="utf-8"))
        if module.startswith("loader_service.convert") and "loader_service/convert/" not in file.as_posix()
    ]
    assert importers == [("loader_service/cli.py", "loader_service.convert.command")]
    unpicklers = [
        file.name
        for file in MAY_UNPICKLE.parent.glob("*.py")
        for _, module in imported_modules(file.read_text(encoding="utf-8"))
        if module == "loader_service.convert.pickled"
    ]
    assert set(unpicklers) == {"rl4vla.py"}


@pytest.mark.process
def test_no_loader_and_no_trainer_ever_loads_it() -> None:
    """Everything that a loader consists of, imported in a fresh process."""
    program = (
        "import importlib, pkgutil, sys, loader_service, loader_service.cli\n"
        "for module in pkgutil.walk_packages(loader_service.__path__, 'loader_service.'):\n"
        "    if not module.name.startswith('loader_service.convert'):\n"
        "        importlib.import_module(module.name)\n"
        "assert 'loader_service.server.server' in sys.modules and 'loader_service.pieces.worker' in sys.modules\n"
        "print([name for name in sys.modules if name.startswith('loader_service.convert.')])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


@pytest.mark.parametrize(
    "statement",
    [
        "import pickle",
        "from cloudpickle import loads",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "exec(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "os.system(text)",
    ],
)
def test_a_danger_is_caught(statement: str) -> None:
    assert len(dangers(f"import os\n{statement}\n")) == 1


@pytest.mark.parametrize(
    "statement",
    [
        "np.load(path, allow_pickle=False)",
        "yaml.safe_load(text)",
        "model.eval()",
        "torch.load(path, weights_only=True)",
        "subprocess.run([program])",
        "AutoModel.from_pretrained(path, trust_remote_code=config.trust_remote_code)",
    ],
)
def test_what_is_safe_is_not_caught(statement: str) -> None:
    assert dangers(statement) == []
