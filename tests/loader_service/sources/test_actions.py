"""Actions of a row: no-ops and chunks by hand, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from loader_service.sources.actions import is_noop, parse_actions, parse_states
from stoker_proto.errors import DataError


def test_noops_move_nothing_and_keep_the_gripper() -> None:
    rows = [
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0],  # nothing moves, and no gripper command came before
        [0.0, 0.01, 0.0, 0.0, 0.0, 0.0, 1.0],  # just short enough
        [0.008, 0.008, 0.0, 0.0, 0.0, 0.0, 1.0],  # each is short, the movement is 0.0113
        [0.0, 0.0, 0.0, 0.0, 0.06, 0.0, 1.0],
        [0.0, 0.0, 0.0, 0.05, 0.05, 0.0, 1.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0],  # the gripper closes
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0],
    ]
    actions = np.array(rows, np.float32)
    assert is_noop(actions).tolist() == [True, True, False, True, False, False, True]


def test_actions_are_float32_rows() -> None:
    actions = parse_actions([[0.1, 2], [-3, 1e-50]], 2)
    assert actions.dtype == np.float32
    assert actions.tolist() == [[np.float32(0.1), 2.0], [-3.0, 0.0]]


@pytest.mark.parametrize(
    ("value", "field", "said"),
    [
        (None, "actions", "None: a list of at least one action"),
        ([], "actions", "[]: a list of at least one action"),
        ({"a": 1}, "actions", "a list of at least one action"),
        ([[1.0, 2.0], [1.0]], "actions[1]", "1 numbers: an action has 2 numbers"),
        ([[1.0, 2.0, 3.0]], "actions[0]", "3 numbers: an action has 2 numbers"),
        ([1.0, 2.0], "actions[0]", "1.0: an action has 2 numbers"),
        ([[1.0, None]], "actions[0][1]", "None: a number is expected"),
        ([[1.0, "x"]], "actions[0][1]", "'x': a number is expected"),
        ([[1.0, "0.1"]], "actions[0][1]", "'0.1': a number is expected"),  # numpy would read it
        ([["1", "2"]], "actions[0][0]", "'1': a number is expected"),
        ([[1.0, 2.0], [3, "nan"]], "actions[1][1]", "'nan': a number is expected"),
        ([[1.0, [2.0]]], "actions[0][1]", "[2.0]: a number is expected"),
        ([[1.0, 2.0], [float("nan"), 0.0]], "actions[1][0]", "nan is not a finite 32-bit number"),
        ([[1.0, float("-inf")]], "actions[0][1]", "-inf is not a finite"),
        ([[1.0, 1e300]], "actions[0][1]", "1e+300 is not a finite"),
        ([[1.0, 10**400]], "actions[0][1]", "0000... is not a finite"),
    ],
)
def test_wrong_actions_are_named(value: object, field: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_actions(value, 2)
    assert caught.value.field == field
    assert said in caught.value.reason


def test_states_in_text_are_named() -> None:
    with pytest.raises(DataError) as caught:
        parse_states([[0.5, 1], ["0.5", 1]], 2)
    assert caught.value.field == "states[1][0]"
    assert "'0.5': a number is expected" in caught.value.reason
    assert parse_states([[0.5, 1], [2, -1]], 2).tolist() == [[0.5, 1.0], [2.0, -1.0]]
