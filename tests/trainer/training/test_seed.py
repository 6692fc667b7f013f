"""The seed of a step: a function of run, step and rank."""

from __future__ import annotations

import random
import traceback

import numpy as np
import pytest
import torch

from stoker_proto.hashing import key64
from trainer.training.step import seed_step


def drawn(seed: int, step: int, rank: int) -> tuple[float, float, float]:
    seed_step(seed, step, rank)
    return float(torch.rand(())), random.random(), float(np.random.random())


def test_the_numbers_of_a_step_depend_on_run_step_and_rank() -> None:
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    first = [drawn(*place) for place in places]
    assert [drawn(*place) for place in places] == first
    assert all(len(set(numbers)) == 4 for numbers in zip(*first, strict=True))


def test_the_seed_is_that_of_torch_without_its_stack_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(key64("step", 0, 7, 1) & ((1 << 63) - 1))
    expected = float(torch.rand(()))
    monkeypatch.setattr(traceback, "format_stack", lambda: pytest.fail("a stack trace is formatted in each step"))
    seed_step(0, 7, 1)
    assert float(torch.rand(())) == expected
