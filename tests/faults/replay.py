"""Run one schedule again and print all that happened: `python -m tests.faults.replay SEED [--mutant NAME]`."""

from __future__ import annotations

import argparse
import sys
import traceback

from tests.faults.mutants import MUTANTS
from tests.faults.seeds import draw
from tests.faults.simulator import simulate
from trainer.feed.client.core import Core


def command(seed: int, mutant: str = "") -> str:
    """The command that replays a seed, from the repository's root."""
    return f"PYTHONPATH=.:proto python -m tests.faults.replay {seed}" + (f" --mutant {mutant}" if mutant else "")


def main() -> int:
    """Print scenario, events and what was violated; 1 if something was."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seed", type=int)
    parser.add_argument("--mutant", choices=sorted(MUTANTS), help="break the core like this")
    arguments = parser.parse_args()
    outcome = simulate(arguments.seed, MUTANTS.get(arguments.mutant, Core), keep_log=True)
    print(draw(arguments.seed).describe())
    print("\n".join(outcome.log))
    if outcome.violation is None:
        print(f"seed {arguments.seed}: all promises kept, {outcome.virtual_s:g} virtual seconds")
        return 0
    if outcome.violation.__cause__ is not None:
        traceback.print_exception(outcome.violation.__cause__)
    print(f"seed {arguments.seed}: VIOLATION of {outcome.violation}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
