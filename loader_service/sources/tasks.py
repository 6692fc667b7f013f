"""Task id -> instruction: `tasks.yaml` beside this file, overridden by the user's own table (`data.task_table`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from loader_service.sources.half_characters import HalfCharacter, is_whole, refuse_half
from stoker_proto.errors import ConfigError, DataError

_MOST_SHOWN = 20
BUILT_IN = Path(__file__).with_name("tasks.yaml")


def load_task_table(path: str | None) -> dict[str, str]:
    """The built-in table, extended and overridden by the YAML file `path`. Raises ConfigError."""
    table = _read(BUILT_IN)
    if path is not None:
        table.update(_read(Path(path)))
    return table


def instruction_of(row: Mapping[str, object], table: Mapping[str, str]) -> str:
    """The row's own `instruction`, else that of its `task`. Raises DataError(field=...)."""
    instruction = row.get("instruction")
    if instruction is not None:
        if not isinstance(instruction, str) or not instruction.strip():
            raise DataError(
                f"{instruction!r}: a text is expected; write one, or leave the key out", field="instruction"
            )
        if not is_whole(instruction):
            refuse_half(HalfCharacter(instruction), "instruction")
        return instruction
    task = row.get("task")
    if not isinstance(task, str):
        raise DataError(
            f"{task!r}: the row has no `instruction`, so a task id is expected here; its keys are {_keys(row)}: rename the one "
            "that holds the text to `instruction`",
            field="task",
        )
    if task not in table:
        raise DataError(
            f"the row has no `instruction` and the task {task!r} has none in the table: add `instruction` to the row, or "
            f"the line `{task}: what to do` to the file that data.task_table names",
            field="task",
        )
    return table[task]


def _keys(row: Mapping[str, object]) -> str:
    shown = ", ".join(key[:40] for key in list(row)[:_MOST_SHOWN])
    return f"{shown} ..." if len(row) > _MOST_SHOWN else shown or "none"


def _read(path: Path) -> dict[str, str]:
    key = "data.task_table"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key} {path} cannot be read ({error}); name a YAML file `task id: instruction`") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{key} {path} is not YAML: {' '.join(str(error).split())}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{key} {path}: a mapping `task id: instruction` is expected, not {type(tree).__name__}")
    for task, instruction in tree.items():
        if not isinstance(task, str) or not isinstance(instruction, str) or not instruction.strip():
            raise ConfigError(f"{key} {path}: {task!r}: {instruction!r} is not `task id: instruction` in words")
        if not is_whole(task + instruction):
            raise ConfigError(
                f"{key} {path}: {task!r}: {instruction!r}: half of a surrogate pair is no character; correct it"
            )
    return tree
