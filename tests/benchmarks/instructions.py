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
ROWS = 8
"""Rows of a piece."""


def write_chats(file: Path) -> None:
    """64 dialogues of 1 to 4 turns, the same at each call."""
    rows = []
    for number in range(64):
        messages = []
        for turn in range(1 + number % 4):
            words = " ".join(f"cube {number} moves {step} cm" for step in range(2 + (number * 7 + turn * 3) % 9))
            messages += [{"role": "user", "content": words}, {"role": "assistant", "content": f"{words}, done"}]
        rows.append(json.dumps({"messages": messages}))
    file.write_text("\n".join(rows) + "\n")


def run_part(folder: Path, part: str, passes: int) -> int:
    """Child: do the part `passes` times; print and return the number of samples of one pass."""
    from loader_service.pieces.encoder import RecordEncoder
    from loader_service.pieces.piece import assemble_piece
    from loader_service.plan.lane_plan import PlanKey
    from loader_service.plan.plan_files import make_plan
    from loader_service.prepare.run import prepare
    from stoker_proto.processor import Processor
    from stoker_proto.wire.encoding import decode, encode
    from stoker_proto.wire.messages import Piece, Ticket
    from tests.tiny_models import make_config
    from trainer.feed.batch import BatchBuilder

    data, _, side = part.partition("-")
    robot = data == "robot"
    shards = ROOT / "tests" / "data" / "maniskill" / "val.jsonl" if robot else folder / "chats.jsonl"
    config = make_config(
        folder / ("llava" if robot else "causal"),
        f"data.dataset_type={'mani_openpi' if robot else 'chat'}",
        f"data.train_data_paths=[{shards}]",
        f"data.cache_dir={folder / 'cache'}",
        "data.max_seq_len=1024",
        "data.order.lanes=1",
        f"data.packing={'true' if data == 'packed' else 'false'}",
    )
    prepared = prepare(config, splits=("train",))
    processor = Processor.build(config, prepared.codec)
    manifest = prepared.entries["train"][0]
    plan = make_plan(manifest, config.data, PlanKey("train", 0, 0))
    length = plan.lane_length(0)

    def frames() -> list[bytes]:
        encoder = RecordEncoder(config.data, processor)
        records = {record: encoder.encode(manifest, record, 0) for record in range(manifest.num_records)}
        filler = next(iter(records.values())).samples[0]
        made = []
        for number, start in enumerate(range(0, length, ROWS)):
            count = min(ROWS, length - start)
            ticket = Ticket(ticket=number, split="train", epoch=0, lane=0, start=start, count=count)
            made.append(encode(assemble_piece(ticket, "l", 0, plan.rows(0, start, count), records, filler)))
        return made

    def batches(made: list[bytes]) -> None:
        builder = BatchBuilder(decoder=processor, num_rows=ROWS, max_tokens=1024, packing=config.data.packing)
        for frame in made:
            piece = decode(frame)
            assert isinstance(piece, Piece)
            builder([piece])

    if side == "encode":
        for _ in range(passes):
            frames()
    else:
        made = frames()
        for _ in range(passes):
            batches(made)
    print(manifest.total_samples)
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
    from tests.tiny_models import write_model_folder

    figures = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_chats(folder / "chats.jsonl")
        write_model_folder(folder / "llava", "llava")
        write_model_folder(folder / "causal", "causal")
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
