"""Command-line options of the programs that run a policy: the evaluator and the server."""

from __future__ import annotations

import argparse

from stoker_proto.arguments import positive


def add_policy_options(parser: argparse.ArgumentParser, *, threads: int | None) -> None:
    """`--execute`, `--device` and `--threads`. threads: the default; None: torch's own."""
    add = parser.add_argument
    add("--execute", type=positive, metavar="K", help="actions of a predicted chunk to execute before the model looks "
        "again (default: all)")  # fmt: skip
    add("--device", default="cpu", help="torch device of the model (default %(default)s)")
    add("--threads", type=positive, default=threads, metavar="N", help="torch threads of the model (default: "
        + ("torch's own)" if threads is None else "%(default)s)"))  # fmt: skip
