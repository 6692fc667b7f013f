"""Many schedules with fresh seeds: `make soak-sim`, `SOAK_SEEDS=1000000 make soak-sim`. Stops at the first that fails."""

from __future__ import annotations

import os
import secrets
import sys
import time

from tqdm import tqdm

from tests.faults.replay import command
from tests.faults.simulator import simulate

DEFAULT_SEEDS = 200_000


def main() -> int:
    """0 if all promises were kept."""
    count = int(os.environ.get("SOAK_SEEDS", DEFAULT_SEEDS))
    first = secrets.randbelow(1 << 48)
    began = time.monotonic()
    for seed in tqdm(range(first, first + count), unit="schedule", smoothing=0.05):
        violation = simulate(seed).violation
        if violation is not None:
            print(f"seed {seed}: VIOLATION of {violation}\nreplay it: {command(seed)}")
            return 1
    print(f"{count} schedules from seed {first}: all promises kept, {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
