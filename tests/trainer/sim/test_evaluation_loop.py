"""The loop with real simulator processes of the small pushing world: a policy sees pictures, and nothing else helps it."""

import ast
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from stoker_proto.errors import ConfigError
from tests.support.slowness import slowness
from tests.trainer.sim.pushing import Reader
from trainer.policy_io import PolicyInput, Prediction
from trainer.sim.evaluation.episode import EpisodeResult, Job, Protocol
from trainer.sim.evaluation.matching import Expectations
from trainer.sim.evaluation.rollout import Lost, Predictor, Rollout
from trainer.sim.evaluation.simulators import Simulators
from trainer.sim.tasks.interface import Rendering
from trainer.sim.workers import Interrupts

REPOSITORY = Path(__file__).resolve().parents[3]
PUSHING = "tests.trainer.sim.pushing"
EXPECTED = Expectations(num_images=(1, 1), state_width=None, action_width=3, chunk=1)

needs_processes = pytest.mark.process


class Seen:
    """A watcher that counts pictures."""

    def __init__(self) -> None:
        self.pictures: Counter[Job] = Counter()
        self.ends: list[tuple[Job, bool]] = []

    def saw(self, job: Job, images: Sequence[NDArray[np.uint8]]) -> None:
        assert images[0].dtype == np.uint8
        self.pictures[job] += 1

    def ended(self, job: Job, result: EpisodeResult | None) -> None:
        self.ends.append((job, result is not None))


def play(
    policy: Predictor,
    task: str,
    seeds: Sequence[int],
    *,
    processes: int = 2,
    batch: int = 1,
    deadline_s: float = 300,
    expected: Expectations = EXPECTED,
    protocol: Protocol | None = None,
    watcher: Seen | None = None,
) -> Iterator[EpisodeResult | Lost]:
    rendering = Rendering(image_size=64)
    with Interrupts() as interrupts:
        simulators = Simulators(processes, [PUSHING], rendering, interrupts, deadline_s=deadline_s)
        protocol = protocol or Protocol(execute=1)
        with simulators:
            rollout = Rollout(policy, simulators, protocol, expected, watcher or Seen(), batch=batch)
            yield from rollout.play([Job(task=task, seed=seed) for seed in seeds])


def results(outcomes: Iterator[EpisodeResult | Lost]) -> list[EpisodeResult]:
    found = []
    for outcome in outcomes:
        assert isinstance(outcome, EpisodeResult), outcome
        found.append(outcome)
    return sorted(found, key=lambda one: one.seed)


@needs_processes
def test_success_comes_from_the_pictures_and_falls_when_they_are_another_episodes() -> None:
    own = results(play(Reader(), "pushing", range(30)))
    assert [one.seed for one in own] == list(range(30))
    assert sum(one.success_once for one in own) == 30
    swapped = results(play(Reader(), "swapped", range(30)))
    assert sum(one.success_once for one in swapped) < 3


@needs_processes
def test_results_do_not_depend_on_processes_and_batches() -> None:
    alone = results(play(Reader(), "pushing", range(6), processes=1))
    assert results(play(Reader(), "pushing", range(6), processes=3, batch=3)) == alone
    assert results(play(Reader(), "pushing", [5, 0, 3], processes=1)) == [alone[0], alone[3], alone[5]]


class Batches(Reader):
    """Remembers how many inputs it got at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def predict(self, inputs: Sequence[PolicyInput]) -> list[Prediction]:
        self.sizes.append(len(inputs))
        return super().predict(inputs)


@needs_processes
@pytest.mark.parametrize(("batch", "most"), [(1, {1}), (2, {1, 2})])
def test_the_policy_gets_at_most_a_batch(batch: int, most: set[int]) -> None:
    policy = Batches()
    results(play(policy, "pushing", range(4), processes=3, batch=batch))
    assert set(policy.sizes) <= most


@needs_processes
def test_a_policy_is_told_pictures_instruction_and_the_state_that_it_asks_for() -> None:
    policy, watcher = Reader(), Seen()
    [episode] = results(play(policy, "pushing", [4], watcher=watcher))
    assert len(policy.inputs) == episode.steps
    assert watcher.pictures == {Job(task="pushing", seed=4): episode.steps + 1}
    assert watcher.ends == [(Job(task="pushing", seed=4), True)]
    for one in policy.inputs:
        assert [image.shape for image in one.images] == [(64, 64, 3)]
        assert (one.instruction, one.state) == ("push the blue disc onto the red ring", None)
    asks = Reader()
    expected = Expectations(num_images=None, state_width=2, action_width=3, chunk=1)
    results(play(asks, "pushing", [4], expected=expected, protocol=Protocol(execute=1, state="hand", max_steps=3)))
    states = [one.state for one in asks.inputs]
    assert len(states) == 3
    assert all(state is not None and state.shape == (2,) and (state < 0.3).all() for state in states)


@needs_processes
def test_a_process_that_dies_costs_its_episode_and_is_replaced() -> None:
    watcher = Seen()
    outcomes = list(play(Reader(), "crashing", range(4), watcher=watcher))
    lost = [one for one in outcomes if isinstance(one, Lost)]
    assert sorted(one.job.seed for one in lost) == [1, 3]
    assert {one.reason for one in lost} == {"exit code 7"}
    played = [one for one in outcomes if isinstance(one, EpisodeResult)]
    assert sorted((one.seed, one.success_once) for one in played) == [(0, True), (2, True)]
    assert sorted((job.seed, done) for job, done in watcher.ends) == [(0, True), (1, False), (2, True), (3, False)]


@needs_processes
def test_what_an_environment_raises_costs_its_episode() -> None:
    outcomes = list(play(Reader(), "raising", range(3), processes=1))
    [lost] = [one for one in outcomes if isinstance(one, Lost)]
    assert (lost.job.seed, lost.reason) == (1, "ValueError: the gripper is not a number")
    assert len(outcomes) == 3


@needs_processes
def test_a_simulator_that_does_not_answer_is_killed() -> None:
    deadline_s = 10 * slowness()  # to start a process and build the world takes about one second
    outcomes = list(play(Reader(), "hanging", [1, 2], processes=1, deadline_s=deadline_s))
    lost, played = outcomes
    assert isinstance(lost, Lost)
    assert lost.reason == f"no answer within {deadline_s:.0f} s"
    assert isinstance(played, EpisodeResult)
    assert (played.seed, played.success_once) == (2, True)


@needs_processes
@pytest.mark.parametrize(
    ("task", "expected", "message"),
    [
        (
            "two cameras",
            EXPECTED,
            "trained with 1 pictures a timestep, and here are 2 .cameras above, again; 1 moments",
        ),
        ("wide", EXPECTED, "actions have 3 numbers, and the environment's 4 .delta_xy."),
        (
            "pushing",
            Expectations(num_images=(1, 1), state_width=9, action_width=3, chunk=1),
            r"a state of 9 numbers, and --state is not given: .* here are: hand \(2\)",
        ),
    ],
)
def test_an_environment_that_does_not_fit_is_refused(task: str, expected: Expectations, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(play(Reader(), task, [0], processes=1, expected=expected))


@pytest.mark.process
def test_neither_evaluator_nor_simulator_imports_an_expert_or_a_model() -> None:
    """In a fresh process; torch and transformers come with the policy only, so that simulators stay small."""
    code = (
        "import sys, trainer.sim.evaluate, trainer.sim.tasks.shipped, trainer.sim.tasks.gym_task\n"
        "print([name for name in sys.modules if 'expert' in name or name in ('torch', 'transformers', 'trainer.policy')])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "proto")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_code_of_the_evaluator_reads_the_true_state() -> None:
    """`Environment.state()` and its PrivilegedState are for the experts."""
    folders = [REPOSITORY / "trainer" / "sim" / name for name in ("evaluation", "tasks")]
    files = [file for folder in folders for file in folder.glob("*.py")] + [
        REPOSITORY / "trainer" / "sim" / "evaluate.py"
    ]
    assert len(files) >= 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not any("expert" in name or name == "PrivilegedState" for name in names), f"{file}: {names}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr != "state", f"{file}:{node.lineno} reads the true state"
