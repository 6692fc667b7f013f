"""proto/PROTOCOL.md names for each guarantee the tests that fail without it: they exist."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent.parent
TEXT = (TESTS.parent / "proto" / "PROTOCOL.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


def functions(file: Path) -> set[str]:
    return {
        node.name for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
    }


def test_every_guarantee_names_tests_that_exist() -> None:
    parts = re.split(r"^\*\*(G\d+) ", TEXT.partition("### Not promised")[0], flags=re.M)
    guarantees = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert list(guarantees) == [f"G{number}" for number in range(1, 14)]
    for name, text in guarantees.items():
        named = NAMED.findall(text)
        assert named, f"{name} names no test"
        for file, function in named:
            assert (TESTS / file).is_file(), f"{name}: there is no tests/{file}"
            assert function in functions(TESTS / file), f"{name}: tests/{file} has no {function}"


def test_the_limits_are_those_of_the_code() -> None:
    from loader_service.server import clients, server
    from stoker_proto.config import LoaderConfig

    for value in (
        clients.MAX_TICKETS_PER_CLIENT,
        clients.MAX_ROWS_PER_CLIENT,
        server.MAX_UNREAD_FRAMES,
        server.MAX_UNHEARD,
    ):
        assert f"| {value:,}" in TEXT
    assert f"`loader.unread_mb` ({LoaderConfig().unread_mb:,} MiB)" in TEXT
