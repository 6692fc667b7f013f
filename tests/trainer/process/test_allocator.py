"""A rank keeps the memory that a step frees."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

_STEPS = """
import ctypes, resource, sys
import numpy as np
from trainer.process.allocator import keep_freed_memory

PR_SET_THP_DISABLE = 41  # huge pages would make few faults of many
assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
print(keep_freed_memory() if "keep" in sys.argv else None)
for number in range(41):
    if number == 1:  # the first step has the memory for the first time
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [np.ones(1 << 20, np.float32) for _ in range(3)]  # 4 MiB each
    del arrays
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 40)
"""


def _page_faults_of_a_step(*arguments: str, **environment: str) -> tuple[str, int]:
    kept = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", _STEPS, *arguments],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    said, faults = done.stdout.split()
    return said, int(faults)


@pytest.mark.process
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_step_gets_no_fresh_pages_from_the_kernel() -> None:
    assert _page_faults_of_a_step()[1] > 1000  # 12 MiB are 3072 pages; a kernel may map some together
    assert _page_faults_of_a_step("keep") == ("True", pytest.approx(0, abs=30))


@pytest.mark.process
def test_a_users_own_tuning_of_malloc_is_left_alone() -> None:
    assert _page_faults_of_a_step("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
