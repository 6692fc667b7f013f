"""When the evaluations of a run begin, and how their results come back.

    after each step    what is ready is handed over; those that are due begin
    at the last step   those that have not evaluated it begin
    at the end         what still runs is awaited, after all that the ranks do together

Every rank calls `after_step` and `at_last_step` at the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trainer.evals.interface import Moment, Outcome
from trainer.evals.registry import Planned


class EvalSchedule:
    """All evaluations of a run."""

    def __init__(self, planned: Sequence[Planned]) -> None:
        self._planned = list(planned)

    @property
    def have_all_begun(self) -> bool:
        """Whether each evaluation has begun at least once."""
        return all(one.begun_at >= 0 for one in self._planned)

    def is_due(self, step: int) -> bool:
        """Whether an evaluation begins after this step."""
        return any(one.interval and step % one.interval == 0 for one in self._planned)

    def after_step(self, step: int, moment: Callable[[], Moment]) -> list[Outcome]:
        """What is ready; begins what is due after this step. moment: called only if something is due."""
        due = [one for one in self._planned if one.interval and step % one.interval == 0]
        ready = [found for one in self._planned for found in one.eval.finished()]
        return ready + self._begin(due, step, moment)

    def at_last_step(self, step: int, moment: Callable[[], Moment]) -> list[Outcome]:
        """Begin what has not evaluated this step."""
        return self._begin([one for one in self._planned if one.begun_at != step], step, moment)

    def wait(self) -> list[Outcome]:
        """What still runs, when it is ready."""
        return [found for one in self._planned for found in one.eval.wait()]

    def close(self) -> None:
        """End what still runs."""
        for one in self._planned:
            one.eval.close()

    @staticmethod
    def _begin(due: Sequence[Planned], step: int, moment: Callable[[], Moment]) -> list[Outcome]:
        if not due:
            return []
        now = moment()
        outcomes = []
        for one in due:
            one.begun_at = step
            found = one.eval.begin(now)
            if found is not None:
                outcomes.append(found)
        return outcomes
