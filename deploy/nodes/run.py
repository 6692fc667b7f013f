"""The course of a run on one of its nodes: meet, start loaders, start ranks, end together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil

from deploy.child import say
from deploy.completion import CompletionRecord
from deploy.keeper import Signals, signal_group, wait_group
from deploy.loaders import Loaders
from deploy.node import SaveRequests, check_complete, check_left_over, start_trainer, stop_trainer, trainer_exit_code
from deploy.nodes.coordinator import ENDED, FACTS, READY
from deploy.nodes.meeting import Guest, Host, Meeting
from deploy.nodes.membership import Membership
from deploy.nodes.plan import LocalPlan
from deploy.nodes.ssh import OtherNodes
from stoker_proto.config.security import SecurityConfig
from stoker_proto.errors import ConfigError
from stoker_proto.host.names import look_up_host
from stoker_proto.host.ports import free_port

_LOOK_S = 0.5
_DISCARD_PORT = 9  # nothing is sent there: asking for a route needs some port


@dataclass(frozen=True, slots=True, kw_only=True)
class NodesPlan:
    """What this node brings to the run."""

    membership: Membership
    security: SecurityConfig
    node_address: str | None
    """Of this node, as the others reach it; None: the one towards node 0."""
    facts: Callable[[], dict[str, Any]]
    """This node's facts, without its address. Raises ConfigError."""
    local_plan: Callable[[list[dict[str, Any]]], LocalPlan]
    """Facts of all nodes -> what this node starts. Raises ConfigError."""
    other_command: Callable[[int, str], list[str]]
    """Number of another node and its host -> the command that starts it by ssh."""
    nodes_deadline_s: float = 120.0
    lost_s: float = 30.0
    trainer_grace_s: float = 45.0
    """From a stop signal, or another node's failure, to SIGKILL."""
    left_over_s: float = 10.0


class _RunOver(Exception):
    """The run ends before ranks ran, or while they do. The code is this launcher's exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def run_nodes(plan: NodesPlan, signals: Signals) -> int:
    """This node's part of the run. Returns the exit code."""
    membership = plan.membership
    try:
        address, facts = find_own_address(plan, signals), plan.facts()
        meeting = _make_meeting(plan, address)
    except ConfigError as error:
        say("launch", f"error: {error}")
        return 1
    others = OtherNodes()
    try:
        with meeting:
            others.start(membership.others, plan.other_command)
            run = _NodeRun(plan, meeting, signals, others)
            return run.run({**facts, "address": address})
    finally:
        others.end(signals)


def _make_meeting(plan: NodesPlan, address: str) -> Meeting:
    membership = plan.membership
    if membership.node == 0:
        return Host(address, membership.port, membership.num_nodes, plan.lost_s, plan.security)
    return Guest(membership.node, membership.master, membership.port, plan.lost_s, plan.security)


class _NodeRun:
    def __init__(self, plan: NodesPlan, meeting: Meeting, signals: Signals, others: OtherNodes) -> None:
        self._plan, self._meeting, self._signals, self._others = plan, meeting, signals, others
        self._node = plan.membership.node

    def run(self, facts: dict[str, Any]) -> int:
        try:
            self._meeting.give(FACTS, facts)
            agreed = self._wait(FACTS, self._plan.nodes_deadline_s)
            try:
                local = self._plan.local_plan(agreed)
            except ConfigError as error:
                self._fail(str(error))
            self._meeting.continue_without(local.without_ranks)
            if self._node == 0:
                say("launch", f"{len(agreed)} nodes have met: {', '.join(one['address'] for one in agreed)}")
            loaders = Loaders(local.loaders)
            try:
                return self._train(local, loaders)
            finally:
                loaders.end(self._signals)
        except _RunOver as over:
            return over.code

    def _train(self, local: LocalPlan, loaders: Loaders) -> int:
        code = loaders.wait_ready(self._signals, self._is_over)
        self._check_over()
        if code:
            self._fail("a loader did not start: its own message stands there", code)
        here = local.addresses[self._node]
        self._meeting.give(READY, {"loaders": loaders.addresses, "port": free_port(here)})
        ready = self._wait(READY, None)
        if not local.ranks:
            self._meeting.give(ENDED, 0)
            return self._until_end(loaders, None, local)
        record = CompletionRecord(local.completion_record)
        trainer = start_trainer(local.trainer(ready), local.trainer_environment(interface_of(here)))
        return self._until_end(loaders, trainer, local, record)

    def _until_end(
        self,
        loaders: Loaders,
        trainer: subprocess.Popen[bytes] | None,
        local: LocalPlan,
        record: CompletionRecord | None = None,
    ) -> int:
        """Watch loaders and ranks until the ranks of all nodes have ended. Returns the run's exit code."""
        failed_at: float | None = None
        is_running = trainer is not None
        saving = SaveRequests(self._signals)
        while True:
            self._signals.wait(_LOOK_S)
            loaders.look_after(may_restart=True)
            self._others.look()
            if stop := self._stop_signal():
                return self._stop(trainer, stop)
            if trainer is not None and saving.are_asked(self._meeting.save):
                self._meeting.pass_on(save=True)
                saving.pass_on(trainer.pid)
            if trainer is not None and is_running and trainer.poll() is not None:
                is_running = False
                self._meeting.give(ENDED, self._code_of(trainer, local, record))
            codes = self._meeting.agreed(ENDED)
            if codes is not None:
                return next((code for code in codes if code), 0)
            if over := self._meeting.aborted:
                say("launch", f"error: {over['reason']}")
                if trainer is not None:
                    signal_group(trainer.pid, signal.SIGKILL)
                    wait_group(trainer.pid, self._plan.left_over_s, self._signals)
                return over["code"]
            if self._meeting.failed and is_running and trainer is not None:
                failed_at = failed_at or time.monotonic()
                if time.monotonic() - failed_at > self._plan.trainer_grace_s:
                    node, code = self._meeting.failed
                    say("launch", f"node {node}'s ranks ended with exit code {code}: those of this node are killed")
                    signal_group(trainer.pid, signal.SIGKILL)

    def _code_of(self, trainer: subprocess.Popen[bytes], local: LocalPlan, record: CompletionRecord | None) -> int:
        code = check_left_over(trainer.pid, trainer_exit_code(trainer.wait()), self._plan.left_over_s, self._signals)
        if code == 0 and record is not None and self._node == local.first:
            return check_complete(record)
        return code

    def _stop_signal(self) -> signal.Signals | None:
        if self._signals.received:
            return self._signals.received[0]
        return signal.Signals(self._meeting.stop) if self._meeting.stop else None

    def _stop(self, trainer: subprocess.Popen[bytes] | None, stop: signal.Signals) -> int:
        """Pass the signal to the ranks of all nodes, and wait for those of this one."""
        self._meeting.pass_on(stop=stop)
        if trainer is None:
            self._wait_for_ranks()
            return 128 + stop
        grace_s, num_known = self._plan.trainer_grace_s, len(self._signals.received)
        say(
            "launch",
            f"{stop.name}: passed on to the ranks of all nodes, which have {grace_s:g} s; once more kills them",
        )
        passed_on = signal.SIGTERM if stop == signal.SIGHUP else stop
        stop_trainer(trainer.pid, stop)
        if not wait_group(trainer.pid, grace_s, self._signals, num_known):
            say("launch", "the ranks of this node did not end in time and were killed")
        trainer.wait()  # DeepSpeed's launcher ends with 1 after any signal
        self._meeting.give(ENDED, 128 + passed_on)
        return 128 + passed_on

    def _wait_for_ranks(self) -> None:
        """Of the other nodes, which may still need data."""
        end, known = time.monotonic() + self._plan.trainer_grace_s, len(self._signals.received)
        while self._meeting.agreed(ENDED) is None and self._meeting.aborted is None:
            if time.monotonic() > end or len(self._signals.received) > known:
                return
            self._signals.wait(_LOOK_S)

    # -- before there are ranks

    def _wait(self, name: str, deadline_s: float | None) -> list[Any]:
        """The values of all nodes. Raises _RunOver."""
        end = None if deadline_s is None else time.monotonic() + deadline_s
        while (values := self._meeting.agreed(name)) is None:
            self._check_over()
            if end is not None and time.monotonic() > end:
                self._fail(
                    f"the nodes have not met within {deadline_s:g} s (--nodes-deadline-s): {self._meeting.missing()}"
                )
            self._signals.wait(0.1)
        return values

    def _is_over(self) -> bool:
        self._others.look()
        return bool(self._others.problem or self._meeting.aborted or self._meeting.stop or self._signals.saves)

    def _check_over(self) -> None:
        """Raises _RunOver if the run ends before its ranks have started."""
        if self._is_over() and self._others.problem:
            self._fail(self._others.problem)
        if over := self._meeting.aborted:
            say("launch", f"error: {over['reason']}")
            raise _RunOver(over["code"])
        if stop := self._stop_signal():
            say("launch", f"{stop.name} before training began")
            self._meeting.pass_on(stop=stop)
            raise _RunOver(128 + stop)
        if self._signals.saves:
            self._fail("SIGUSR1 before training began", os.EX_TEMPFAIL)

    def _fail(self, reason: str, code: int = 1) -> None:
        """End the run on all nodes. Raises _RunOver."""
        say("launch", f"error: {reason}")
        self._meeting.give_up(f"node {self._node} ({socket.gethostname()}): {reason}", code)
        raise _RunOver(code)


def find_own_address(plan: NodesPlan, signals: Signals) -> str:
    """This node's address, as the others reach it. Waits for node 0's name to be known. Raises ConfigError."""
    master, is_first = plan.membership.master, plan.membership.node == 0
    if plan.node_address:
        return plan.node_address
    end = time.monotonic() + plan.nodes_deadline_s
    while True:
        try:
            found = [info[4][0] for info in look_up_host(master, None, type=socket.SOCK_DGRAM)]
            break
        except OSError as error:
            if signals.received or time.monotonic() > end:
                raise ConfigError(
                    f"node 0's name {master!r} is not known here ({error}): pass another --master-addr, e.g. its IP address"
                ) from error
            signals.wait(1.0)
    target = str(found[0])
    if not is_first:
        return _towards(target)
    own = [str(address) for address in found if not str(address).startswith("127.") and str(address) != "::1"]
    return own[0] if own else _only_address(master)


def _towards(target: str) -> str:
    with socket.socket(socket.AF_INET6 if ":" in target else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, _DISCARD_PORT))
        except OSError as error:
            raise ConfigError(
                f"node 0's address {target} cannot be reached from here ({error}): check --master-addr"
            ) from error
        return str(probe.getsockname()[0])


def _only_address(master: str) -> str:
    """The one address of this host beyond loopback: where a host's own name means 127.0.1.1, as on Debian."""
    running = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = [
        one.address
        for name, addresses in psutil.net_if_addrs().items()
        for one in addresses
        if name in running and one.family == socket.AF_INET and not one.address.startswith("127.")
    ]
    if len(found) != 1:
        raise ConfigError(
            f"node 0's name {master!r} means the loopback here, and this host has {len(found)} other addresses "
            f"({', '.join(found)}): pass the one that the other nodes reach, on all nodes: --master-addr IP"
        )
    return found[0]


def interface_of(address: str) -> str | None:
    """The network device that has the address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            return name
    return None
