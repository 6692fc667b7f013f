"""The loop: simulators show, the policy predicts, simulators execute."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol as Interface

import numpy as np
from numpy.typing import NDArray

from trainer.policy_io import PolicyInput, Prediction
from trainer.sim.evaluation.episode import Episode, EpisodeResult, Job, Protocol
from trainer.sim.evaluation.matching import Expectations, check_match
from trainer.sim.evaluation.simulators import Began, Died, Facts, Simulators


class Predictor(Interface):
    """The acting policy: `trainer.policy.Policy`, or any other object that predicts chunks from a policy's inputs."""

    def predict(self, inputs: Sequence[PolicyInput]) -> Sequence[Prediction]:
        """One prediction for each input, in their order."""


class Watcher(Interface):
    """Sees the pictures of the episodes, for videos."""

    def saw(self, job: Job, images: Sequence[NDArray[np.uint8]]) -> None:
        """The pictures of the next timestep of an episode."""

    def ended(self, job: Job, result: EpisodeResult | None) -> None:
        """The episode is over; None: its simulator died."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """An episode whose simulator died; it has no result."""

    job: Job
    reason: str


class Rollout:
    """Plays episodes with one policy."""

    def __init__(
        self,
        policy: Predictor,
        simulators: Simulators,
        protocol: Protocol,
        expectations: Expectations,
        watcher: Watcher,
        *,
        batch: int = 1,
    ) -> None:
        """batch: most inputs that the policy gets at once. With 1 a result does not depend on what else runs."""
        self._policy, self._simulators, self._protocol = policy, simulators, protocol
        self._expectations, self._watcher, self._batch = expectations, watcher, batch
        self._running: dict[int, Episode] = {}
        self.facts: dict[str, Facts] = {}
        """Task -> what its environment says of itself."""

    def play(self, jobs: Iterable[Job]) -> Iterator[EpisodeResult | Lost]:
        """Play all jobs, begun in their order; yields each as it ends. Raises ConfigError, PolicyError."""
        waiting = deque(jobs)
        while waiting or self._running:
            for number in range(len(self._simulators)):
                if waiting and number not in self._running:
                    self._running[number] = Episode(waiting[0], self._protocol)
                    self._simulators.begin(number, waiting.popleft())
            shown = []
            for number, answer in self._simulators.answers():
                episode = self._running[number]
                if isinstance(answer, Died):
                    del self._running[number]
                    self._watcher.ended(episode.job, None)
                    yield Lost(job=episode.job, reason=answer.reason)
                elif isinstance(answer, Began):
                    check_match(self._expectations, self._protocol, episode.job.task, answer)
                    self.facts[episode.job.task] = answer.facts
                    episode.begin(answer.view, answer.instruction, answer.facts.max_steps)
                    self._watcher.saw(episode.job, episode.images)
                    shown.append(number)
                else:
                    is_over = episode.observe(answer)
                    self._watcher.saw(episode.job, episode.images)
                    if not is_over:
                        shown.append(number)
                        continue
                    del self._running[number]
                    self._watcher.ended(episode.job, episode.result())
                    yield episode.result()
            self._act(shown)

    def _act(self, numbers: Sequence[int]) -> None:
        """The next action of these simulators, which have shown what it follows from."""
        ask = [number for number in numbers if self._running[number].needs_prediction]
        for start in range(0, len(ask), self._batch):
            part = ask[start : start + self._batch]
            inputs = [self._running[number].policy_input() for number in part]
            for number, prediction in zip(part, self._policy.predict(inputs), strict=True):
                self._running[number].predicted(prediction)
        for number in numbers:
            self._simulators.step(number, self._running[number].next_action())
