"""Both gates, task by task.

    replay       the recorded actions are played open loop from their seeds
    round trip   the same actions, encoded to tokens and decoded again, of the episodes whose replay succeeds

A gate fails if fewer than `least` of its episodes succeed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from stoker_proto.processor import Processor
from trainer.sim.replay.diagnosis import explain_replay, explain_round_trip
from trainer.sim.replay.plays import Play, Player
from trainer.sim.replay.recordings import Recording
from trainer.sim.replay.round_trip import round_trip


@dataclass(frozen=True, slots=True, kw_only=True)
class GateResult:
    """What came of one gate of one task."""

    gate: str
    task: str
    successes: int
    episodes: int
    reasons: tuple[str, ...] = ()
    """Of a failure."""
    passed: bool

    def lines(self) -> list[str]:
        """For the terminal."""
        verdict = "ok" if self.passed else "FAILED"
        return [
            f"{self.gate:<11} {self.task}: {self.successes} of {self.episodes} succeed: {verdict}",
            *(f"            {reason}" for reason in self.reasons),
        ]


def run_gates(
    episodes: Sequence[Recording],
    processor: Processor | None,
    player: Player,
    least: float,
    report: Callable[[GateResult], None],
) -> bool:
    """Whether all gates pass. processor: None: only the replay. report: is told each result when it is there."""
    results = []
    for task in dict.fromkeys(one.task for one in episodes):
        of_task = [
            Play(task=one.task, seed=one.seed, actions=one.actions, place=one.place)
            for one in episodes
            if one.task == task
        ]
        succeeded = player.successes(of_task)
        failed = [play for play, success in zip(of_task, succeeded, strict=True) if not success]
        right = [play for play, success in zip(of_task, succeeded, strict=True) if success]
        passed = len(right) >= least * len(of_task)
        reasons = () if passed else tuple(explain_replay(player, failed))
        results.append(_result("replay", task, len(right), len(of_task), passed, reasons))
        report(results[-1])
        if processor is not None and right:
            results.append(_round_trip(right, processor, player, least))
            report(results[-1])
    return all(result.passed for result in results)


def _round_trip(recorded: Sequence[Play], processor: Processor, player: Player, least: float) -> GateResult:
    decoded = [replace(play, actions=round_trip(play.actions, processor)) for play in recorded]
    succeeded = player.successes(decoded)
    failed = [number for number, success in enumerate(succeeded) if not success]
    passed = sum(succeeded) >= least * len(decoded)
    reasons: tuple[str, ...] = ()
    if not passed:
        before, after = [recorded[number] for number in failed], [decoded[number] for number in failed]
        reasons = tuple(explain_round_trip(player, before, after))
    return _result("round trip", recorded[0].task, sum(succeeded), len(decoded), passed, reasons)


def _result(gate: str, task: str, successes: int, episodes: int, passed: bool, reasons: tuple[str, ...]) -> GateResult:
    return GateResult(gate=gate, task=task, successes=successes, episodes=episodes, passed=passed, reasons=reasons)
