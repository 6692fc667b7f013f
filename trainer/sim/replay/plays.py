"""Actions -> successes: each episode is played open loop from its seed, in simulator processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stoker_proto.errors import ConfigError, StokerError
from trainer.sim.evaluation.episode import Job
from trainer.sim.evaluation.simulators import Began, Died, Simulators


class SimulatorsDiedError(StokerError):
    """More simulator processes died than may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Play:
    """One episode to be played."""

    task: str
    seed: int
    actions: NDArray[np.float32]
    """float32[T, D]."""
    place: str
    """Where the actions come from, for messages."""


EXTRA_STEPS = 3
"""The last action is repeated this often: a recording ends with its first success, which coarser actions may just miss."""


class Player:
    """Plays episodes; success is that of any step."""

    def __init__(self, simulators: Simulators, most_deaths: int) -> None:
        self._simulators, self._most_deaths = simulators, most_deaths
        self.num_deaths = 0

    def successes(self, plays: Sequence[Play]) -> list[bool]:
        """Whether each succeeds, in their order. An episode whose simulator dies is played again.

        Raises ConfigError for actions of another width than the environment's, SimulatorsDiedError.
        """
        found = [False] * len(plays)
        waiting, running = deque(range(len(plays))), dict[int, tuple[int, int]]()
        while waiting or running:
            for number in range(len(self._simulators)):
                if waiting and number not in running:
                    running[number] = waiting.popleft(), 0
                    play = plays[running[number][0]]
                    self._simulators.begin(number, Job(task=play.task, seed=play.seed))
            for number, answer in self._simulators.answers():
                index, num_steps = running[number]
                play = plays[index]
                if isinstance(answer, Died):
                    self._count_death(play, answer)
                    waiting.appendleft(index)
                    del running[number]
                    continue
                if isinstance(answer, Began):
                    _check_width(play, answer)
                else:
                    num_steps += 1
                    found[index] = answer.success
                    if answer.success or num_steps == len(play.actions) + EXTRA_STEPS:
                        del running[number]
                        continue
                running[number] = index, num_steps
                self._simulators.step(number, play.actions[min(num_steps, len(play.actions) - 1)])
        return found

    def _count_death(self, play: Play, died: Died) -> None:
        self.num_deaths += 1
        if self.num_deaths > self._most_deaths:
            raise SimulatorsDiedError(
                f"{self.num_deaths} simulators died, the last one in {play.task} seed {play.seed}: {died.reason}; try fewer "
                "--processes, and check the renderer: sh trainer/sim/install_renderer.sh --check"
            )


def _check_width(play: Play, began: Began) -> None:
    """Raises ConfigError."""
    width, facts = play.actions.shape[1], began.facts
    if width != facts.action_width:
        raise ConfigError(
            f"{play.place}: actions have {width} numbers, and those of {play.task} have {facts.action_width} "
            f"({facts.control_mode}): take the environment's control mode that the demonstrations were recorded with"
        )
