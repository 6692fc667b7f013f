"""Simulators in processes of their own: one that crashes takes one episode with it, and nothing else.

The process of the evaluator holds the policy and asks; a simulator process answers each question once:

    begin an episode (task, seed)  ->  Began(view, instruction, facts of the environment)
    step (action)                  ->  Stepped(result)
    either                         ->  Died(reason): the process ended, raised, or did not answer in time; it is replaced
    either                         ->  a StokerError of the environment (no renderer, unknown camera): raised here

A simulator process ends when the pipe to the evaluator closes.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from stoker_proto.errors import ConfigError, StokerError
from trainer.sim.evaluation.episode import Job
from trainer.sim.tasks.interface import Rendering, Step, TaskEnvironment, View
from trainer.sim.tasks.registry import load_modules, make_task
from trainer.sim.workers import Interrupts

_END_S = 10.0
"""For a process to end after its pipe was closed, or after SIGTERM; then it is killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What an environment says of itself."""

    cameras: tuple[str, ...]
    control_mode: str
    action_width: int
    max_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Began:
    """An episode has begun."""

    view: View
    instruction: str
    facts: Facts


@dataclass(frozen=True, slots=True)
class Died:
    """A simulator process is gone, and its episode with it."""

    reason: str


Answer = Began | Step | Died


@dataclass(frozen=True, slots=True)
class _Refused:
    """The environment raised a StokerError: a restart would not help."""

    message: str


@dataclass(slots=True)
class _Slot:
    """One simulator process, or the place of one."""

    process: BaseProcess | None = None
    pipe: Connection | None = None
    deadline: float | None = None
    """`time.monotonic()` by which the answer must be there; None: nothing was asked."""


class Simulators:
    """A fixed number of simulator processes; a context manager that leaves none behind."""

    def __init__(
        self, number: int, modules: Sequence[str], rendering: Rendering, interrupts: Interrupts, *, deadline_s: float
    ) -> None:
        """modules: those that register users' environments. deadline_s: for one answer, the building of a scene included."""
        # One thread each: the processes are the parallelism, and sums must not depend on the machine's cores.
        os.environ.update(OMP_NUM_THREADS="1", LP_NUM_THREADS="1")
        self._modules, self._rendering, self._interrupts = tuple(modules), rendering, interrupts
        self._deadline_s = deadline_s
        self._slots = [_Slot() for _ in range(number)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for slot in self._slots:
            if slot.pipe is not None:
                slot.pipe.close()  # a process that waits for a question ends by this
            if kind is not None and slot.process is not None:
                slot.process.terminate()
        for slot in self._slots:
            _end(slot)

    def __len__(self) -> int:
        return len(self._slots)

    def begin(self, number: int, job: Job) -> None:
        """Ask simulator `number` to begin an episode; its process is started where there is none."""
        slot = self._slots[number]
        if slot.process is None:
            self._start(slot)
        self._ask(slot, job)

    def step(self, number: int, action: NDArray[np.float32]) -> None:
        """Ask simulator `number` to execute an action."""
        self._ask(self._slots[number], action)

    def answers(self) -> list[tuple[int, Answer]]:
        """Wait until at least one simulator has answered; (number, answer) of those that have.

        Raises ConfigError if an environment cannot be had.
        """
        pending = {slot.pipe: number for number, slot in enumerate(self._slots) if slot.deadline is not None}
        first = min(slot.deadline for slot in self._slots if slot.deadline is not None)
        ready = wait([pipe for pipe in pending if pipe is not None], max(0.0, first - time.monotonic()))
        found = [(pending[pipe], self._receive(self._slots[pending[pipe]])) for pipe in ready]  # type: ignore[index]
        now = time.monotonic()
        for number, slot in enumerate(self._slots):
            if slot.deadline is not None and slot.deadline <= now and slot.pipe not in ready:
                found.append((number, self._died(slot, f"no answer within {self._deadline_s:.0f} s", kill=True)))
        return found

    def _start(self, slot: _Slot) -> None:
        context = multiprocessing.get_context("spawn")
        slot.pipe, theirs = context.Pipe()
        slot.process = context.Process(
            target=_simulate, args=(theirs, self._modules, self._rendering), name="simulator", daemon=True
        )
        with self._interrupts.held_back():
            slot.process.start()
        theirs.close()

    def _ask(self, slot: _Slot, question: Job | NDArray[np.float32]) -> None:
        assert slot.pipe is not None, "begin comes first"
        slot.deadline = time.monotonic() + self._deadline_s
        try:
            slot.pipe.send(question)
        except OSError:  # it died between two questions: reading says so
            return

    def _receive(self, slot: _Slot) -> Answer:
        assert slot.pipe is not None
        try:
            answer: Answer | _Refused = slot.pipe.recv()
        except (EOFError, OSError):
            return self._died(slot, "")
        if isinstance(answer, _Refused):
            raise ConfigError(answer.message)
        if isinstance(answer, Died):
            return self._died(slot, answer.reason)
        slot.deadline = None
        return answer

    def _died(self, slot: _Slot, reason: str, *, kill: bool = False) -> Died:
        """Clear the slot for a new process."""
        if kill and slot.process is not None:
            slot.process.kill()
        code = _end(slot)
        return Died(
            reason or (f"the process ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}")
        )


def _end(slot: _Slot) -> int:
    """Wait for a process that is about to end, then kill it; its exit code."""
    process, pipe = slot.process, slot.pipe
    slot.process = slot.pipe = slot.deadline = None
    if pipe is not None:
        pipe.close()
    if process is None:
        return 0
    process.join(_END_S)
    if process.is_alive():
        process.kill()
        process.join()
    code = process.exitcode
    process.close()
    return code or 0


def _simulate(pipe: Connection, modules: Sequence[str], rendering: Rendering) -> None:
    """The simulator process: answers questions until the pipe closes, or until something goes wrong."""
    simulator = _Simulator(modules, rendering)
    while True:
        try:
            question = pipe.recv()
        except (EOFError, OSError):
            return  # the evaluator is gone, or needs no more
        try:
            answer: Answer | _Refused = simulator.answer(question)
        except StokerError as error:
            answer = _Refused(str(error))
        except Exception as error:  # noqa: BLE001 - the edge of the process: whatever a simulator raises costs its episode
            answer = Died(f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0])
        try:
            pipe.send(answer)
        except OSError:
            return
        if isinstance(answer, Died | _Refused):
            return


class _Simulator:
    """Holds one environment: of the task that was asked for last."""

    def __init__(self, modules: Sequence[str], rendering: Rendering) -> None:
        self._modules, self._rendering = modules, rendering
        self._environment: TaskEnvironment | None = None
        self._task = ""

    def answer(self, question: Job | NDArray[np.float32]) -> Answer:
        """Raises what the environment raises."""
        if isinstance(question, Job):
            return self._begin(question)
        assert self._environment is not None, "begin comes first"
        return self._environment.step(question)

    def _begin(self, job: Job) -> Began:
        environment = self._of_task(job.task)
        view = environment.reset(job.seed)
        facts = Facts(
            cameras=tuple(environment.cameras),
            control_mode=environment.control_mode,
            action_width=environment.action_width,
            max_steps=environment.max_steps,
        )
        return Began(view=view, instruction=environment.instruction(), facts=facts)

    def _of_task(self, task: str) -> TaskEnvironment:
        if self._environment is None or self._task != task:
            if self._environment is not None:
                self._environment.close()
            load_modules(self._modules)
            self._environment, self._task = make_task(task, self._rendering), task
        return self._environment
