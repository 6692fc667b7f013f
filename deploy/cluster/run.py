"""Supervises one run on a Ray cluster: agents, loaders, ranks; what dies is started again, within bounds.

    a loader dies          started again by its node's agent
    its node dies          a new agent in the same bundle of the placement group, on another node with room
    a rank or its node     all ranks end, and start again; the run resumes from its newest checkpoint

Ranks read the loaders' addresses from a file that their agent keeps, so no rank is restarted for a loader.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deploy.child import say
from deploy.cluster.agent import Agent
from deploy.cluster.plan import ClusterPlan, NodePlan, does_not_fit, restart_pause_s
from deploy.keeper import Signals, as_exit_code

_ANSWER_S = 30.0
"""How long an agent may take to answer before its node counts as dead."""
_LOOK_S = 0.5
_MAX_REASON = 160


class RunFailed(Exception):
    """The run cannot go on; the text says why."""


@dataclass(slots=True)
class _Node:
    """One bundle of the placement group, and the agent that holds it now."""

    plan: NodePlan
    agent: Any = None
    address: str = ""
    starting: Any = None
    """Answer of an agent that is being placed; None once it is there."""
    machine: str = ""
    """Ray's name of the node; a name of its own for each raylet."""
    since: float = field(default_factory=time.monotonic)
    last_error: str = ""
    """Why an agent that was placed did not start."""


@dataclass(slots=True)
class _Loader:
    node: int
    num_restarts: int = 0
    address: str = ""
    """Empty while it is not ready."""
    is_running: bool = False
    is_given_up: bool = False
    start_at: float = 0.0
    """It is not started before."""


class ClusterRun:
    """Call `run` once."""

    def __init__(self, plan: ClusterPlan, signals: Signals) -> None:
        self._plan, self._signals = plan, signals
        self._nodes = [_Node(node) for node in plan.nodes]
        self._loaders = {number: _Loader(n) for n, node in enumerate(plan.nodes) for number in node.loaders}
        self._rank_nodes = {rank: n for n, node in enumerate(plan.nodes) for rank in node.ranks}
        self._ranks: dict[int, int | None] | None = None  # rank -> exit code; None: they do not run
        self._trainer_starts = 0
        self._listed: list[str] | None = None
        self._group: Any = None

    def run(self) -> int:
        """The exit code: 0 if the run is complete."""
        try:
            self._group = placement_group(list(self._plan.resources), strategy="SPREAD")
            for number in range(len(self._nodes)):
                self._place(number)
            self._wait(self._all_placed, self._plan.nodes_deadline_s, self._why_not_placed)
            if len({node.machine for node in self._nodes}) < len(
                self._nodes
            ):  # later, fewer machines are better than none
                raise RunFailed(self._does_not_fit())
            self._check_data()
            self._look()
            self._wait(self._all_ready, self._plan.ready_deadline_s, self._why_not_ready)
            while not self._signals.received:
                self._look()
                if (code := self._look_at_ranks()) is not None:
                    return code
                self._signals.wait(_LOOK_S)
            return 128 + self._signals.received[0]
        except RunFailed as failure:
            say("ray", f"error: {failure}")
            return 1
        finally:
            self._end()

    # -- nodes

    def _place(self, number: int) -> None:
        """Start an agent in the bundle. It waits for room if the bundle has no node."""
        node, resources = self._nodes[number], self._plan.resources[number]
        strategy = PlacementGroupSchedulingStrategy(placement_group=self._group, placement_group_bundle_index=number)
        options = {"num_cpus": resources["CPU"], "num_gpus": resources.get("GPU", 0), "scheduling_strategy": strategy}
        node.agent = (
            ray.remote(_Actor)
            .options(max_restarts=0, **options)
            .remote(dict(self._plan.files), self._plan.working_folder)
        )
        node.starting, node.since, node.address = node.agent.where_ray.remote(), time.monotonic(), ""

    def _all_placed(self) -> bool:
        for number, node in enumerate(self._nodes):
            if node.starting is not None and ray.wait([node.starting], timeout=0)[0]:
                try:
                    host, node.address, node.machine = ray.get(node.starting)
                except RayActorError as error:  # perhaps placed on the node that has just died
                    since, node.last_error = node.since, _first_line(error)
                    self._place(number)
                    node.since = since
                    continue
                except RayError as error:
                    raise RunFailed(f"the agent of node {number} could not start: {_first_line(error)}") from error
                node.starting, self._listed = None, None
                say("ray", f"node {number} is {host} ({node.address}): {_what(node.plan)}")
        return all(node.starting is None for node in self._nodes)

    def _why_not_placed(self) -> str:
        errors = "; ".join(node.last_error for node in self._nodes if node.starting is not None and node.last_error)
        if errors:
            return f"an agent does not start within {self._plan.nodes_deadline_s:g} s (--nodes-deadline-s): {errors}"
        return f"{self._does_not_fit()} and gave no room within {self._plan.nodes_deadline_s:g} s (--nodes-deadline-s)"

    def _does_not_fit(self) -> str:
        there = [(one["NodeManagerAddress"], one["Resources"]) for one in ray.nodes() if one["Alive"]]
        return does_not_fit(self._plan.resources, there)

    def _check_data(self) -> None:
        for number, node in enumerate(self._nodes):
            if node.plan.loaders and (missing := self._ask(number, "missing", list(self._plan.data_paths))):
                raise RunFailed(
                    f"node {number} ({node.address}) is to run loaders and has no {missing[0]}: put the data there, or start Ray "
                    "on the nodes with data with --resources '{\"stoker_data\": 100}' and name it: --data-resource stoker_data"
                )

    def _ask(self, number: int, method: str, *arguments: Any) -> Any:
        """A node's answer; None if the node is dead, which is dealt with."""
        node = self._nodes[number]
        if node.starting is not None:
            return None
        try:
            return ray.get(getattr(node.agent, method).remote(*arguments), timeout=_ANSWER_S)
        except (RayActorError, GetTimeoutError) as error:
            self._node_died(number, _first_line(error))
            return None

    def _node_died(self, number: int, reason: str) -> None:
        node = self._nodes[number]
        say("ray", f"node {number} ({node.address}) is gone: {reason}; looking for room elsewhere")
        ray.kill(node.agent)
        for loader in self._loaders.values():
            if loader.node == number:
                loader.is_running, loader.address = False, ""
        if self._ranks is not None:
            for rank in node.plan.ranks:
                self._ranks[rank] = 1
        self._place(number)

    # -- loaders

    def _look(self) -> None:
        """See how everything stands; start loaders that do not run; tell the ranks where loaders are."""
        self._all_placed()
        for node in self._nodes:
            if node.starting is not None and time.monotonic() > node.since + self._plan.nodes_deadline_s:
                raise RunFailed(self._why_not_placed())
        for number in range(len(self._nodes)):
            for name, (code, ready) in (self._ask(number, "poll") or {}).items():
                kind, _, index = name.partition(" ")
                if kind == "loader":
                    self._see_loader(int(index), name, code, ready)
                elif self._ranks is not None and code is not None:
                    self._ranks[int(index)] = code
        for index, loader in self._loaders.items():
            node = self._nodes[loader.node]
            is_wanted = not loader.is_running and not loader.is_given_up and time.monotonic() >= loader.start_at
            if is_wanted and node.starting is None:
                command = list(self._plan.loader(node.address))
                self._ask(loader.node, "start", f"loader {index}", command, {}, signal.SIGTERM)
                loader.is_running = node.starting is None
        self._tell_ranks()

    def _see_loader(self, index: int, name: str, code: int | None, ready: str | None) -> None:
        loader = self._loaders[index]
        if code is None:
            if ready and not loader.address:
                say("ray", f"{name} is ready at {ready}, on node {loader.node}")
                loader.address = ready
            return
        self._ask(loader.node, "forget", name)
        loader.is_running, loader.address = False, ""
        if code == 0 or loader.num_restarts >= self._plan.loader_restarts:
            loader.is_given_up = True
            say("ray", f"{name} ended with exit code {as_exit_code(code)}; it is not started again")
            return
        loader.num_restarts += 1
        pause_s = restart_pause_s(loader.num_restarts)
        loader.start_at = time.monotonic() + pause_s
        say(
            "ray",
            f"{name} ended with exit code {as_exit_code(code)}; restart {loader.num_restarts} of {self._plan.loader_restarts} in "
            f"{pause_s:g} s",
        )

    def _all_ready(self) -> bool:
        self._look()
        if any(loader.is_given_up for loader in self._loaders.values()):
            raise RunFailed("a loader does not start: its own message stands above")
        return all(loader.address for loader in self._loaders.values())

    def _why_not_ready(self) -> str:
        waiting = [number for number, loader in self._loaders.items() if not loader.address]
        return f"loaders {waiting} were not ready within {self._plan.ready_deadline_s:g} s (--ready-deadline-s)"

    def _tell_ranks(self) -> None:
        addresses = sorted(loader.address for loader in self._loaders.values() if loader.address)
        if addresses != self._listed and addresses:
            for number in set(self._rank_nodes.values()):
                self._ask(number, "list_loaders", addresses)
            self._listed = addresses

    # -- ranks

    def _look_at_ranks(self) -> int | None:
        """Start ranks, or deal with their end. Returns the run's exit code once it is over."""
        if self._ranks is None:
            if self._all_placed():
                self._start_ranks()
            return None
        codes = self._ranks
        if all(code == 0 for code in codes.values()):
            first = self._rank_nodes[0]
            if self._ask(first, "is_complete"):
                return 0
            if self._nodes[first].starting is None:
                codes[0] = 1
                say("ray", f"the ranks ended with exit code 0, and rank 0 did not write {self._plan.completion_record}")
        if any(codes.values()):
            self._ranks_failed()
        return None

    def _start_ranks(self) -> None:
        first = self._rank_nodes[0]
        port = self._ask(first, "free_port")
        self._ask(first, "watch_completion", self._plan.completion_record)
        common = {
            **self._plan.rank_environment,
            "MASTER_ADDR": self._nodes[first].address,
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(len(self._rank_nodes)),
        }
        self._ranks = dict.fromkeys(self._rank_nodes)
        self._trainer_starts += 1
        for number, node in enumerate(self._nodes):
            for local_rank, rank in enumerate(node.plan.ranks):
                places = {"RANK": rank, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": len(node.plan.ranks)}
                environment = {**common, **{name: str(value) for name, value in places.items()}}
                self._ask(number, "start", f"rank {rank}", list(self._plan.rank), environment, signal.SIGKILL)
        say("ray", f"{len(self._rank_nodes)} ranks started on nodes {sorted(set(self._rank_nodes.values()))}")

    def _ranks_failed(self) -> None:
        failed = {rank: code for rank, code in (self._ranks or {}).items() if code}
        rank, code = next(iter(failed.items()))
        again = self._trainer_starts <= self._plan.trainer_restarts
        say("ray", f"rank {rank} ended with exit code {as_exit_code(code or 0)}; all ranks end")
        self._end_ranks(signal.SIGKILL)
        self._ranks = None
        if not again:
            raise RunFailed(
                f"the ranks failed {self._trainer_starts} times (--trainer-restarts {self._plan.trainer_restarts})"
            )
        say(
            "ray",
            f"restart {self._trainer_starts} of {self._plan.trainer_restarts}: the run resumes from its newest checkpoint",
        )

    def _end_ranks(self, number: signal.Signals) -> None:
        for rank, node in self._rank_nodes.items():
            self._ask(node, "signal", f"rank {rank}", number)
        if number == signal.SIGKILL:
            for rank, node in self._rank_nodes.items():
                self._wait_for_end(node, f"rank {rank}")

    def _wait_for_end(self, node: int, name: str) -> None:
        end = time.monotonic() + _ANSWER_S
        while time.monotonic() < end:
            states = self._ask(node, "poll")
            if states is None or name not in states:
                return
            if states[name][0] is not None:
                self._ask(node, "forget", name)
                return
            time.sleep(0.1)

    # -- the end

    def _wait(self, condition: Callable[[], bool], deadline_s: float, why: Callable[[], str]) -> None:
        end = time.monotonic() + deadline_s
        while not condition():
            if self._signals.received:
                raise RunFailed(f"{self._signals.received[0].name}: ended before training began")
            if time.monotonic() > end:
                raise RunFailed(why())
            self._signals.wait(0.2)

    def _end(self) -> None:
        """Ranks, then loaders, then agents; a second stop signal kills."""
        known = len(self._signals.received)
        live = [number for number, node in enumerate(self._nodes) if node.agent is not None and node.starting is None]
        for kind in ("rank", "loader"):
            self._stop(kind, live, known)
        for node in self._nodes:
            if node.agent is not None:
                try:
                    if node.starting is None:
                        ray.get(node.agent.close.remote(), timeout=_ANSWER_S)
                except RayError as error:
                    say("ray", f"{node.address}: {_first_line(error)}")
                ray.kill(node.agent)
        if self._group is not None:
            remove_placement_group(self._group)

    def _stop(self, kind: str, live: Sequence[int], known: int) -> None:
        """SIGTERM, time to end, SIGKILL."""
        end = time.monotonic() + self._plan.grace_s
        number: signal.Signals | None = signal.SIGTERM
        while True:
            running = []
            for node in live:
                try:
                    states = ray.get(self._nodes[node].agent.poll.remote(), timeout=_ANSWER_S)
                except RayError:
                    continue  # it is gone, with all that it ran
                running += [
                    (node, name) for name, (code, _) in states.items() if name.startswith(kind) and code is None
                ]
            if not running:
                return
            for node, name in running:
                if number is not None:
                    self._nodes[node].agent.signal.remote(name, int(number))
            if number == signal.SIGKILL:
                return
            is_over = time.monotonic() > end or len(self._signals.received) > known
            number = signal.SIGKILL if is_over else None
            self._signals.wait(0.2)


class _Actor(Agent):
    """The agent, and what Ray knows of it."""

    def where_ray(self) -> tuple[str, str, str]:
        """(host, address of the node, Ray's name of it)."""
        return self.where(), ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id()


def _what(plan: NodePlan) -> str:
    parts = [f"rank {rank}" for rank in plan.ranks] + [f"loader {number}" for number in plan.loaders]
    return ", ".join(parts)


def _first_line(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= _MAX_REASON else f"{line[:_MAX_REASON]}..."
