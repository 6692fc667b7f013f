"""Instructions per sample of encode (loader) and client (trainer), counted by valgrind's callgrind: knows no clock.

    python tests/benchmarks/instructions.py            # needs valgrind

A child process encodes the shipped demonstrations and 64 dialogues, packed and not, into frames of pieces, and decodes such
frames into micro-batches. Each part runs once and three times under callgrind; half the difference is the count of one pass,
without imports and start. Single-threaded, so the count does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "proto")]
PARTS = ("robot-encode", "robot-client", "chat-encode", "chat-client", "packed-encode", "packed-client")


def run_part(folder: Path, part: str, passes: int) -> int:
    """Child: do the part `passes` times; print and return the number of samples of one pass."""
    from tests.benchmarks.parts import Parts

    data, _, side = part.partition("-")
    parts = Parts(folder, data)
    if side == "encode":
        for _ in range(passes):
            parts.pack(parts.encode())
    else:
        frames = parts.pack(parts.encode())
        for _ in range(passes):
            parts.batches(frames)
    print(parts.num_samples)
    return 0


def count(folder: Path, part: str, passes: int) -> tuple[int, int]:
    """(instructions of the whole child, samples of one pass)."""
    command = [
        *("valgrind", "--tool=callgrind", f"--callgrind-out-file={folder / 'callgrind.out'}"),
        *(sys.executable, __file__, "--part", part, "--passes", str(passes), "--folder", str(folder)),
    ]
    environment = {**os.environ, "PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or found is None:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return int(found[1]), int(done.stdout.split()[-1])


def main() -> int:
    """Count every part and print a table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: all of {', '.join(PARTS)}")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--passes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        return run_part(arguments.folder, arguments.part, arguments.passes)
    from tests.benchmarks.parts import write_inputs

    figures = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        for part in arguments.parts or PARTS:
            run = [sys.executable, __file__, "--part", part, "--passes", "0", "--folder", name]
            subprocess.run(run, check=True, capture_output=True)  # the manifest is in the cache from here on
            once, samples = count(folder, part, 1)
            thrice, _ = count(folder, part, 3)
            figures[part] = (thrice - once) / 2 / samples
            print(f"{part:16} {figures[part]:14,.0f} instructions per sample ({samples} samples)", flush=True)
    print(json.dumps({part: round(figure) for part, figure in figures.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
