"""Instructions: the row's own, the user's table, the built-in one."""

from __future__ import annotations

from pathlib import Path

import pytest

from loader_service.sources.tasks import instruction_of, load_task_table
from stoker_proto.errors import ConfigError, DataError


def test_the_row_goes_before_the_users_table_and_that_before_the_built_in_one(tmp_path: Path) -> None:
    (tmp_path / "tasks.yaml").write_text("PickCube-v1: take the cube\nMyTask-v0: do it\n")
    table = load_task_table(str(tmp_path / "tasks.yaml"))
    assert instruction_of({"task": "PickCube-v1", "instruction": "grab it"}, table) == "grab it"
    assert instruction_of({"task": "PickCube-v1"}, table) == "take the cube"
    assert instruction_of({"task": "MyTask-v0"}, table) == "do it"
    assert instruction_of({"task": "PushCube-v1"}, table) == "push the cube to the goal"
    assert "put" in instruction_of({"task": "PutOnPlateInScene25Main-v3"}, load_task_table(None))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"task": "Juggle-v1"},
            "add `instruction` to the row, or the line `Juggle-v1: what to do` to the file that data.task",
        ),
        ({}, "field task: None: the row has no `instruction`"),
        ({"task": 5}, "field task: 5: "),
        ({"task": "PickCube-v1", "instruction": "  "}, "field instruction: '  ': a text is expected"),
        ({"task": "PickCube-v1", "instruction": ["a"]}, "field instruction: ['a']: a text is expected"),
        (
            {"instruction": "push \ud800"},
            r"field instruction: 'push \ud800': half of a surrogate pair is no character; correct or remove the row",
        ),
    ],
)
def test_rows_without_an_instruction_are_refused(row: dict[str, object], said: str) -> None:
    with pytest.raises(DataError) as caught:
        instruction_of(row, load_task_table(None))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b\n", "a mapping `task id: instruction` is expected, not list"),
        ("Task-v1: [a]\n", "'Task-v1': ['a'] is not `task id: instruction` in words"),
        ("Task-v1:\n", "'Task-v1': None is not"),
        ("a: b: c\n", "is not YAML"),
        ('Task-v1: "push \\ud800"\n', r"'Task-v1': 'push \ud800': half of a surrogate pair is no character"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_task_table(str(path))
    assert str(caught.value).startswith(f"data.task_table {path}")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.task_table .*absent\.yaml cannot be read"):
        load_task_table(str(tmp_path / "absent.yaml"))
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert load_task_table(str(tmp_path / "empty.yaml")) == load_task_table(None)


def test_the_keys_of_a_row_without_an_instruction_are_listed() -> None:
    with pytest.raises(DataError, match=r"no `instruction`.*its keys are actions, language, obs_path: rename the one"):
        instruction_of({"actions": [], "language": "push the cube", "obs_path": "a.npz"}, {})
