"""Node 0's rules: which nodes are here, what all of them have said, who is lost. No socket, no clock of its own.

Every node sends its whole state again and again, and gets the whole state of the run back. So a lost message costs nothing.

    node -> node 0    {"node": 1, "id": "9f...", "said": {"facts": {...}, "ready": {...}, "ended": 0}, "abort": null, "stop": 0,
                       "save": false, "left": false}
    node 0 -> node    {"agreed": {"facts": [...], "ready": [...]}, "abort": null, "stop": 0, "save": false, "failed": null}
                      or {"refused": "why"}

`agreed` holds a round's values of all nodes, by node, once every node has said its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

from deploy.nodes.facts import difference

FACTS, READY, ENDED = ROUNDS = ("facts", "ready", "ended")


class Abort(TypedDict):
    """Why the run ends early, and the exit code."""

    reason: str
    code: int


@dataclass(slots=True)
class _Member:
    identity: str
    heard_at: float
    said: dict[str, Any] = field(default_factory=dict)
    is_lost: bool = False
    has_left: bool = False
    """It has seen how the run ends."""


class Coordinator:
    """Call `hear` for each message and `look` now and then."""

    def __init__(self, num_nodes: int, lost_s: float) -> None:
        """lost_s: a node that is silent for longer is lost."""
        self.num_nodes, self._lost_s = num_nodes, lost_s
        self.members: dict[int, _Member] = {}
        self.agreed: dict[str, list[Any]] = {}
        self.abort: Abort | None = None
        self.stop = 0
        self.save = False
        self.dispensable: frozenset[int] = frozenset()
        """Nodes without ranks: the run continues without them. Set once the plan is made."""
        self.lost: list[int] = []
        """Dispensable nodes that were lost, in order."""

    def hear(self, message: Any, now: float) -> dict[str, Any]:
        """Take a node's state; returns the answer."""
        if not is_valid(message, self.num_nodes):
            return {
                "refused": "this is no message of a node of this run: start all nodes with the same version and num_nodes"
            }
        node, identity = message["node"], message["id"]
        member = self.members.get(node)
        if member is None:
            member = self.members[node] = _Member(identity, now)
        if member.identity != identity:
            return {"refused": f"another launcher is node {node} already: give each node its own number"}
        if member.is_lost:
            return {
                "refused": f"node {node} was silent for more than {self._lost_s:g} s, and the run continued without it"
            }
        member.heard_at = now
        member.said.update(message["said"])
        member.has_left = message["left"]
        self.abort = self.abort or message["abort"]
        self.stop = self.stop or message["stop"]
        self.save = self.save or message["save"]
        self._agree()
        return self.state(member.said)

    def look(self, now: float) -> None:
        """Find nodes that have been silent for too long."""
        if ENDED in self.agreed or self.abort:
            return
        for node, member in sorted(self.members.items()):
            if member.is_lost or member.has_left or now - member.heard_at <= self._lost_s:
                continue
            if READY in self.agreed and node in self.dispensable:
                member.is_lost = True
                member.said[ENDED] = 0
                self.lost.append(node)
            elif READY in self.agreed:
                self.abort = {
                    "reason": f"{self.name(node)} has not been heard of for {self._lost_s:g} s (--node-lost-s): all ranks end; "
                    "once the nodes reach each other, the same command resumes from the newest checkpoint",
                    "code": 1,
                }
            else:
                self.abort = {"reason": f"{self.name(node)} has gone while the run was starting", "code": 1}
        self._agree()

    def missing(self) -> list[int]:
        """Nodes that have not come."""
        return [node for node in range(self.num_nodes) if node not in self.members]

    def name(self, node: int) -> str:
        """A node, for messages."""
        facts = self.members[node].said.get(FACTS) if node in self.members else None
        return node_name(node, facts)

    def failed(self) -> tuple[int, int] | None:
        """(node, exit code) of the first node whose ranks have failed."""
        codes = [(node, member.said.get(ENDED)) for node, member in sorted(self.members.items())]
        return next(((node, code) for node, code in codes if code), None)

    def state(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """The state of the run, for a node that has said this: without the rounds that it knows to be over."""
        known = next((name for name in reversed(ROUNDS) if name in said), FACTS)
        first = ROUNDS.index(known)
        return {
            "agreed": {name: self.agreed[name] for name in ROUNDS[first:] if name in self.agreed},
            "abort": self.abort,
            "stop": self.stop,
            "save": self.save,
            "failed": self.failed(),
        }

    def all_have_left(self, own: int = 0) -> bool:
        """Whether every other node that still lives has seen how the run ends."""
        others = [member for node, member in self.members.items() if node != own]
        return all(member.has_left or member.is_lost for member in others)

    def _agree(self) -> None:
        for name in ROUNDS:
            if name in self.agreed or not self._have_all_said(name):
                continue
            values: list[Any] = [self.members[node].said[name] for node in range(self.num_nodes)]
            if name == FACTS:
                problem = difference([(node_name(node, facts), facts) for node, facts in enumerate(values)])
                if problem:
                    self.abort = self.abort or {"reason": problem, "code": 1}
                    return
                values = [{part: facts[part] for part in ("host", "address", "devices")} for facts in values]
            self.agreed[name] = values

    def _have_all_said(self, name: str) -> bool:
        return all(node in self.members and name in self.members[node].said for node in range(self.num_nodes))


def node_name(node: int, facts: Mapping[str, Any] | None) -> str:
    """`node 1 (host-b, 10.0.0.2)`."""
    return f"node {node} ({facts['host']}, {facts['address']})" if facts else f"node {node}"


def is_valid(message: Any, num_nodes: int) -> bool:
    """Whether the fields of a node's message have the right types."""
    if not isinstance(message, dict) or set(message) != {"node", "id", "said", "abort", "stop", "save", "left"}:
        return False
    said, abort = message["said"], message["abort"]
    return (
        type(message["node"]) is int
        and 0 <= message["node"] < num_nodes
        and isinstance(message["id"], str)
        and isinstance(said, dict)
        and all(_is_value(name, value) for name, value in said.items())
        and (abort is None or _is_abort(abort))
        and type(message["stop"]) is int
        and 0 <= message["stop"] < 64
        and isinstance(message["save"], bool)
        and isinstance(message["left"], bool)
    )


def _is_value(name: str, value: Any) -> bool:
    if name == FACTS:
        texts, tables = ("host", "address"), ("versions", "config")
        return (
            isinstance(value, dict)
            and type(value.get("devices")) is int
            and all(isinstance(value.get(text), str) for text in texts)
            and all(isinstance(value.get(table), dict) for table in tables)
            and all(isinstance(one, str) for table in tables for one in value[table].values())
        )
    if name == READY:
        return (
            isinstance(value, dict)
            and type(value.get("port")) is int
            and isinstance(value.get("loaders"), list)
            and all(isinstance(address, str) for address in value["loaders"])
        )
    return name == ENDED and type(value) is int


def _is_abort(abort: Any) -> bool:
    return (
        isinstance(abort, dict)
        and set(abort) == {"reason", "code"}
        and isinstance(abort["reason"], str)
        and type(abort["code"]) is int
    )
