"""The work that a sample costs does not grow unseen: counts without a clock, against a baseline in this folder."""

from __future__ import annotations

import json

import pytest

from tests.benchmarks.work import BASELINE, PARTS, count_work, measured, versions, worse


@pytest.mark.process
def test_no_part_does_more_work_than_the_baseline() -> None:
    baseline = json.loads(BASELINE.read_text())
    if baseline["versions"] != versions():
        pytest.skip(f"NOT TESTED: the baseline is of {baseline['versions']}, and this is {versions()}")
    figures = measured()
    assert set(figures) == set(PARTS)
    lines = worse(figures, baseline["figures"])
    assert not lines, "\n".join(
        [*lines, "mend it; or, if it is worth its work: python tests/benchmarks/work.py --renew, and say why"]
    )


def test_three_percent_more_is_worse_and_less_is_not() -> None:
    baseline = {"encode": {"python_calls": 100.0, "bytecodes": 1000.0}, "pack": {"copies_per_piece": 2.0}}
    same = {"encode": {"python_calls": 103.0, "bytecodes": 400.0}, "pack": {"copies_per_piece": 2.06}}
    assert worse(same, baseline) == []
    more = {
        "encode": {"python_calls": 103.1, "bytecodes": 1000.0},
        "pack": {"copies_per_piece": 3.0},
        "new": {"x": 1.0},
    }
    assert worse(more, baseline) == [
        "encode python_calls: 100.00 before, 103.10 now (+3.1%; at most +3%)",
        "new x: None before, 1.0 now: renew the baseline",
        "pack copies_per_piece: 2.00 before, 3.00 now (+50.0%; at most +3%)",
    ]
    assert worse({"encode": {"python_calls": 100.0}, "pack": {"copies_per_piece": 2.0}}, baseline) == [
        "encode bytecodes: 1000.0 before, None now: renew the baseline"
    ]


def test_what_is_counted() -> None:
    def twice(number: int) -> int:
        return 2 * number

    def work() -> list[int]:
        return [twice(number) for number in (1000, 2000, 3000)]

    found = count_work(work, samples=1)
    assert found["python_calls"] == 5  # work, the comprehension, and three times twice
    assert found["library_calls"] == 0
    kept = [
        count_work(lambda stop=stop: [twice(number) for number in range(1000, stop)], samples=1)["allocations_kept"]
        for stop in (1100, 1300)
    ]
    assert kept[1] - kept[0] == pytest.approx(200, abs=20)  # one for each number; other threads allocate, too
    more = count_work(lambda: [*work(), len("x")], samples=1)
    assert (more["python_calls"], more["library_calls"]) == (6, 1)
    assert more["bytecodes"] > found["bytecodes"] > 25
    assert count_work(lambda: bytes(10**6), samples=10)["peak_bytes"] == pytest.approx(10**5, rel=0.01)
