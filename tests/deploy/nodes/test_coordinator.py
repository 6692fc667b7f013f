"""Node 0's rules: what is agreed, who is refused, who is lost."""

from __future__ import annotations

from typing import Any

import pytest

from deploy.nodes.coordinator import ENDED, FACTS, READY, Coordinator

LOST_S = 30.0


def facts(node: int, **versions: str) -> dict[str, Any]:
    return {
        "host": f"host-{node}",
        "address": f"10.0.0.{node + 1}",
        "devices": 0,
        "versions": {"torch": "2.8", **versions},
        "config": {"trainer.lr": "0.001"},
    }


def message(node: int, said: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    empty = {"node": node, "id": f"id-{node}", "abort": None, "stop": 0, "save": False, "left": False}
    return {**empty, "said": {FACTS: facts(node)} if said is None else said, **fields}


def ready(node: int) -> dict[str, Any]:
    return {FACTS: facts(node), READY: {"loaders": [f"tcp://10.0.0.{node + 1}:1"], "port": 1}}


def three_ready(dispensable: frozenset[int] = frozenset()) -> Coordinator:
    coordinator = Coordinator(3, LOST_S)
    coordinator.dispensable = dispensable
    for node in range(3):
        coordinator.hear(message(node, ready(node)), 0.0)
    assert READY in coordinator.agreed
    return coordinator


def test_a_round_is_agreed_once_all_have_spoken_and_is_told_until_they_know() -> None:
    coordinator = Coordinator(2, LOST_S)
    assert coordinator.hear(message(1), 0.0)["agreed"] == {}
    assert coordinator.missing() == [0]
    coordinator.hear(message(0), 1.0)
    answer = coordinator.hear(message(1), 2.0)
    assert answer["agreed"] == {
        FACTS: [{"host": f"host-{node}", "address": f"10.0.0.{node + 1}", "devices": 0} for node in range(2)]
    }
    coordinator.hear(message(0, ready(0)), 3.0)
    answer = coordinator.hear(message(1, ready(1)), 3.0)
    assert set(answer["agreed"]) == {READY}, "a node that speaks of loaders knows the facts"
    assert [one["loaders"] for one in answer["agreed"][READY]] == [["tcp://10.0.0.1:1"], ["tcp://10.0.0.2:1"]]


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (
            facts(1, torch="2.9"),
            "versions differ: torch is 2.8 on node 0 (host-0, 10.0.0.1) and 2.9 on node 1 (host-1, 10.0.0.2); install the same "
            "on all nodes",
        ),
        (
            {**facts(1), "config": {"trainer.lr": "0.002"}},
            "configs differ: trainer.lr is 0.001 on node 0 (host-0, 10.0.0.1) and 0.002 on node 1 (host-1, 10.0.0.2); "
            "use one config",
        ),
    ],
)
def test_nodes_that_differ_are_refused_with_the_difference(other: dict[str, Any], reason: str) -> None:
    coordinator = Coordinator(2, LOST_S)
    coordinator.hear(message(0), 0.0)
    answer = coordinator.hear(message(1, {FACTS: other}), 0.0)
    assert answer["abort"] == {"reason": reason, "code": 1}
    assert answer["agreed"] == {}


def test_a_node_that_only_loads_needs_no_torch() -> None:
    coordinator = Coordinator(2, LOST_S)
    coordinator.hear(message(0), 0.0)
    assert FACTS in coordinator.hear(message(1, {FACTS: facts(1, torch="")}), 0.0)["agreed"]


def test_a_silent_node_with_ranks_ends_the_run_and_one_without_does_not() -> None:
    coordinator = three_ready(frozenset({2}))
    coordinator.hear(message(0, ready(0)), 31.0)
    coordinator.hear(message(1, ready(1)), 31.0)
    coordinator.look(31.0)
    assert (coordinator.abort, coordinator.lost) == (None, [2])
    assert coordinator.hear(message(2, ready(2)), 32.0) == {
        "refused": "node 2 was silent for more than 30 s, and the run continued without it"
    }
    for node in range(2):
        coordinator.hear(message(node, {ENDED: 0}), 33.0)
    assert coordinator.agreed[ENDED] == [0, 0, 0], "the lost node is not waited for"

    coordinator = three_ready(frozenset({2}))
    coordinator.hear(message(0, ready(0)), 31.0)
    coordinator.look(31.0)
    assert coordinator.abort is not None
    assert coordinator.abort["reason"].startswith(
        "node 1 (host-1, 10.0.0.2) has not been heard of for 30 s (--node-lost-s)"
    )


def test_who_has_left_is_not_lost_and_node_0_waits_for_all_to_leave() -> None:
    coordinator = three_ready()
    coordinator.hear(message(1, {ENDED: 143}, left=True), 1.0)
    for now in (20.0, 40.0, 60.0):
        for node in (0, 2):
            coordinator.hear(message(node, {}), now)
        coordinator.look(now)
    assert coordinator.abort is None
    assert coordinator.failed() == (1, 143)
    assert not coordinator.all_have_left()
    coordinator.hear(message(2, {ENDED: 143}, left=True), 61.0)
    assert coordinator.all_have_left()


def test_a_stop_and_an_abort_reach_all() -> None:
    coordinator = three_ready()
    coordinator.hear(message(1, {}, stop=15, save=True), 1.0)
    answer = coordinator.hear(message(2, {}, abort={"reason": "no disk", "code": 3}), 1.0)
    assert (answer["stop"], answer["save"], answer["abort"]) == (15, True, {"reason": "no disk", "code": 3})
    assert coordinator.hear(message(1, {}, abort={"reason": "too late", "code": 4}), 1.0)["abort"]["code"] == 3


def test_two_launchers_with_one_number() -> None:
    coordinator = Coordinator(2, LOST_S)
    coordinator.hear(message(1), 0.0)
    assert coordinator.hear(message(1, id="other"), 0.0) == {
        "refused": "another launcher is node 1 already: give each node its own number"
    }


@pytest.mark.parametrize(
    "bad",
    [
        None,
        [],
        {"node": 1},
        message(2),
        message(-1),
        message(1, id=5),
        message(1, {"other": 1}),
        message(1, {ENDED: True}),
        message(1, {ENDED: "0"}),
        message(1, {READY: {"loaders": "tcp://a:1", "port": 1}}),
        message(1, {FACTS: {"host": "a"}}),
        message(1, stop=-1),
        message(1, stop=True),
        message(1, save=1),
        message(1, abort={"reason": 1, "code": 1}),
    ],
)
def test_a_message_that_is_none_changes_nothing(bad: Any) -> None:
    coordinator = Coordinator(2, LOST_S)
    assert "this is no message of a node of this run" in coordinator.hear(bad, 0.0)["refused"]
    assert coordinator.members == {}
