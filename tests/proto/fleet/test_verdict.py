"""The rules of the verdict on literal windows."""

from __future__ import annotations

from datetime import datetime

import pytest

from stoker_proto.fleet.verdict import Counters, Judge, LoaderWork, TrainerWork, work_between

NOW = datetime(2026, 11, 30, 14, 2)
TWO = ["trainer-bound: loaders could give 6.0x", "loader 2 is slow: 16% of the pace of its peers since 14:02"]
DELIVERY = (
    "delivery-bound: the trainer waits 50% of the time, and the loaders' threads work 10% of it: raise trainer.feed.prefetch, "
    "or look at the network"
)


def loader(name: str = "loader 1", *, samples: float = 100, records: float = 10, **stage_s: float) -> LoaderWork:
    """Ten seconds of four threads."""
    stages = {"read": 1.0, "decode": 2.0, "pack": 1.0} | stage_s
    return LoaderWork(name=name, seconds=10, samples=samples, records=records, threads=4, stage_s=stages)


def trainer(wait_s: float, samples: float = 100) -> TrainerWork:
    return TrainerWork(samples=samples, step_s=10, wait_s=wait_s)


@pytest.mark.parametrize(
    ("loaders", "training", "expected"),
    [
        # 40 thread seconds, 4 busy: ten times as much.
        ([loader()], trainer(0.1), ["trainer-bound: loaders could give 10.0x"]),
        # One at a tenth and one at a half: (10 / 0.1 + 10 / 0.5) / 20.
        ([loader(), loader("loader 2", decode=18)], trainer(0.4), TWO),
        ([loader(read=0.1, decode=0.1, pack=0.1)], trainer(0), ["trainer-bound: loaders could give more than 20x"]),
        # Two loaders give 20 samples/s at full load; 200 samples in 5 s of training want 40.
        ([loader(decode=38), loader("loader 2", decode=38)], trainer(5, 200), ["decode-bound: add 2 loaders"]),
        ([loader(decode=38)], trainer(1, 100), ["decode-bound: add 1 loader"]),
        ([loader(read=30, decode=3)], trainer(9.9, 100), ["read-bound: add 16 loaders"]),
        ([loader()], trainer(5), [DELIVERY]),
        ([loader(samples=0)], trainer(5), []),
        ([loader()], None, []),
        # Half the records in the same busy time; what is packed from memory does not count.
        (
            [loader(), loader("loader 2"), loader("loader 3", records=5, pack=30)],
            None,
            ["loader 3 is slow: half the pace of its peers since 14:02"],
        ),
        ([loader(), loader("loader 2", records=4)], None, []),
        ([loader(), loader("loader 2", records=7)], None, []),
    ],
)  # fmt: skip
def test_a_window_has_its_verdicts(
    loaders: list[LoaderWork], training: TrainerWork | None, expected: list[str]
) -> None:
    assert [verdict.text for verdict in Judge().look(loaders, training, NOW)] == expected


def test_a_slow_loader_is_remembered_until_it_is_measured_anew() -> None:
    judge = Judge()
    slow, quick, idle = loader("b", records=5), loader("b"), loader("b", records=0)
    later = NOW.replace(hour=15)

    def said(one: LoaderWork, now: datetime) -> list[str]:
        return [verdict.text.rpartition(" ")[2] for verdict in judge.look([loader("a"), one], None, now)]

    assert said(slow, NOW) == ["14:02"]
    assert said(slow, later) == ["14:02"]
    assert said(idle, later) == [], "nothing to measure"
    assert said(slow, later) == ["14:02"]
    assert said(quick, later) == []
    assert said(slow, later) == ["15:02"]


def test_a_restart_and_an_empty_window_give_no_figures() -> None:
    def at(uptime_s: float, samples: float) -> Counters:
        return Counters(uptime_s=uptime_s, samples=samples, records=samples, threads=2, stage_s={"read": uptime_s / 2})

    work = work_between("x", at(10, 50), at(20, 80))
    assert work is not None
    assert (work.seconds, work.samples, work.busy, work.pace) == (10, 30, 0.25, 6.0)
    assert work_between("x", at(10, 50), at(20, 5)) is None
    assert work_between("x", at(10, 50), at(10, 50)) is None
