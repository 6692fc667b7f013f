"""Commands that run beside a training: a policy of its newest checkpoint collects episodes meanwhile (DAgger).

    training   ---- step 500 ---------- step 1000 ---------- export
    collectors       `- task A, policy of step 500   `- task B, policy of step 1000

Training never waits for a collector. Episodes that are collected beside a round are data of the next round. The loaders of a
round have a fixed list of files, so a batch stays a function of its ticket, and the round resumes exactly.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from deploy.child import run_command

POLL_S = 1.0
_COPY_TRIES = 10


def run_beside(
    training: Sequence[str], output_dir: Path, jobs: Sequence[Callable[[Path], Sequence[str]]], cwd: Path
) -> tuple[int, list[int]]:
    """Run the training, and the jobs beside it, one after the other; (its exit code, theirs: fewer if one fails).

    output_dir: of the training. A job makes its command from the folder of a policy: the newest checkpoint when it starts, or the
    export once the training has ended. If the training fails, no further job is started. Ends both on an interrupt.
    """
    codes: list[int] = []
    with subprocess.Popen(training, cwd=cwd) as process:
        try:
            for job in jobs:
                policy = _wait_for_policy(process, output_dir)
                if policy is None:
                    break
                code = run_command(job(policy), cwd)
                codes.append(code)
                if code:
                    break
            return process.wait(), codes
        except BaseException:  # an interrupt: a terminal tells the training too, SIGTERM does not
            process.terminate()
            raise


def _wait_for_policy(training: subprocess.Popen[bytes], output_dir: Path) -> Path | None:
    """The newest policy, as soon as there is one; None if the training failed. It waits as long as the training runs."""
    while True:
        is_over = training.poll() is not None
        if is_over:
            return None if training.returncode else output_dir / "export"
        if (found := newest_checkpoint(output_dir)) is not None:
            return found
        time.sleep(POLL_S)


def newest_checkpoint(output_dir: Path) -> Path | None:
    """A copy (hard links, no bytes) of the newest checkpoint: the training deletes its older ones, even while they are read."""
    for _ in range(_COPY_TRIES):
        found = sorted((output_dir / "checkpoints").glob("step-*"))
        if not found:
            return None
        copy = output_dir / "acting" / found[-1].name
        if copy.exists():
            return copy
        partial = copy.with_name(f".{copy.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            shutil.copytree(found[-1], partial, copy_function=os.link)
        except (FileNotFoundError, shutil.Error):
            if found[-1].exists():
                raise
            continue  # deleted meanwhile: there is a newer one
        partial.rename(copy)
        return copy
    return None
