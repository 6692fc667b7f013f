"""What packing costs: planning an epoch of many records, and a packed row beside a plain reader that joins and cuts tokens.

python tests/benchmarks/packing.py [--records 1000000] [--files 2000] [--model DIR]
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from loader_service.manifest import EntryManifest
from loader_service.pieces.encoder import RecordEncoder
from loader_service.pieces.piece import EncodedSample, assemble_piece
from loader_service.plan.lane_plan import LanePlan, PlanKey
from loader_service.plan.plan_files import make_plan
from loader_service.plan.row_plan import RowPlan
from loader_service.plan.token_counts import TokenCounts
from loader_service.prepare.run import prepare
from loader_service.sources.base import BaseSFTDataset, Sample, ScannedRecord
from stoker_proto.config import Config, DataConfig
from stoker_proto.config.reader import load_config
from stoker_proto.processor import Processor
from stoker_proto.wire import encoding
from stoker_proto.wire.messages import Ticket
from tests.tiny_models import write_model_folder

MAX_SEQ_LEN = 2048
ROWS_OF_A_PIECE = 4


class CountedFiles(BaseSFTDataset):
    """A line of JSON for each file of code, with its tokens counted beforehand."""

    def scan(self, shard: Path) -> Iterator[ScannedRecord]:
        """One record a line."""
        offset = 0
        for line in shard.read_bytes().splitlines(keepends=True):
            yield ScannedRecord(offset=offset, size=len(line), num_samples=1, num_tokens=json.loads(line)["tokens"])
            offset += len(line)

    def read(self, shard: Path, offset: int, size: int) -> Iterator[Sample]:
        """Its text."""
        yield Sample(instruction="", answer=read_line(shard, offset, size)["text"])


def read_line(shard: Path, offset: int, size: int) -> dict[str, str]:
    """One file of code."""
    with shard.open("rb") as file:
        file.seek(offset)
        line: dict[str, str] = json.loads(file.read(size))
    return line


def lognormal(rng: np.random.Generator, count: int, mean: float) -> np.ndarray:
    """Lengths in tokens; sigma 1."""
    return np.maximum(rng.lognormal(np.log(mean) - 0.5, 1.0, count), 1).astype(np.uint32)


def plan_cost(records: int) -> None:
    """Plan an epoch of chats and one of code."""
    rng = np.random.default_rng(0)
    data = DataConfig(dataset_type="x", train_data_paths=("x",), max_seq_len=MAX_SEQ_LEN, packing=True)
    for kind, mean in (("chats", 300.0), ("code", 1500.0)):
        tokens = lognormal(rng, records, mean)
        samples = np.ones(records, np.uint32) if kind == "chats" else -(-tokens.astype(np.int64) // MAX_SEQ_LEN)
        counts = TokenCounts(num_samples=samples.astype(np.uint32), num_tokens=tokens, max_seq_len=MAX_SEQ_LEN)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.process_time()
        plan = RowPlan.make(counts, data, PlanKey("train", 0, 0))
        made = time.process_time() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        started = time.process_time()
        plan.rows(0, 0, 8)
        first = time.process_time() - started
        rows = sum(plan.lane_lengths())
        size = sum(array.nbytes for array in (plan.records, plan.bins, plan.ends))
        filled = int(counts.lengths(plan.records).sum(dtype=np.int64)) / (rows * MAX_SEQ_LEN)
        print(
            f"{kind}: {records:,} records in {rows:,} rows planned in {made:.2f} CPU s; {100 * filled:.2f}% filled; "
            f"{size / records:.1f} bytes a record, {1024 * peak / records:.0f} at the peak; first rows in {1e3 * first:.1f} ms"
        )


def write_files(shard: Path, processor: Processor, tokenizer: Tokenizer, count: int) -> None:
    """Synthetic code, lognormal around 1500 tokens, cut where a row ends so that both readers see the same tokens."""
    rng = np.random.default_rng(1)
    names = [f"value_{i}" for i in range(50)]
    with shard.open("w") as lines:
        for wanted in np.minimum(lognormal(rng, count, 1500.0), MAX_SEQ_LEN - 64).tolist():
            text = ""
            while len(text) < 2 * wanted:
                a, b, c = rng.choice(names, 3)
                text += (
                    f"def {a}({b}, {c}=0):\n    return [{b} * {c} + {int(rng.integers(99))} for {b} in range({c})]\n"
                )
            text = text[: tokenizer.encode(text).offsets[:wanted][-1][1]]
            tokens = len(processor.encode("", 0, answer=text).input_ids)
            lines.write(json.dumps({"text": text, "tokens": tokens}) + "\n")


def plain_cpu(manifest: EntryManifest, tokenizer: Tokenizer, end_id: int) -> tuple[float, int]:
    """CPU seconds and tokens of a reader that tokenises, joins and cuts."""
    started = time.process_time()
    shard, left, rows, total = Path(manifest.shards[0]), np.zeros(0, np.int32), [], 0
    for offset, size in zip(manifest.offsets.tolist(), manifest.sizes.tolist(), strict=True):
        ids = tokenizer.encode(read_line(shard, offset, size)["text"]).ids
        left = np.concatenate((left, np.array([*ids, end_id], np.int32)))
        total += len(ids) + 1
        while len(left) >= MAX_SEQ_LEN:
            rows.append(left[:MAX_SEQ_LEN].copy())
            left = left[MAX_SEQ_LEN:]
    return time.process_time() - started, total


def packed_cpu(config: Config, manifest: EntryManifest, processor: Processor) -> tuple[float, int, int]:
    """CPU seconds, tokens and bytes of an epoch of pieces, from the plan to the frame."""
    started = time.process_time()
    encoder = RecordEncoder(config.data, processor)
    plan: LanePlan = make_plan(manifest, config.data, PlanKey("train", 0, 0))
    filler = EncodedSample(np.array([processor.end_id], np.int32), np.zeros(1, np.uint8), (), None, timestep=0)
    total = num_bytes = 0
    for lane, length in enumerate(plan.lane_lengths()):
        for start in range(0, length, ROWS_OF_A_PIECE):
            count = min(ROWS_OF_A_PIECE, length - start)
            rows = plan.rows(lane, start, count)
            records = {ref.record: encoder.encode(manifest, ref.record, 0) for ref in rows.samples}
            ticket = Ticket(ticket=0, split="train", epoch=0, lane=lane, start=start, count=count)
            piece = assemble_piece(ticket, "bench", 0, rows, records, filler)
            num_bytes += len(encoding.encode(piece))
            total += len(piece.input_ids)
    return time.process_time() - started, total, num_bytes


def row_cost(files: int, model: Path | None, repeats: int) -> None:
    """The two readers in turns, and the ratio of their CPU per file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = model or write_model_folder(folder / "model", "causal")
        shard = folder / "code.jsonl"
        shard.touch()
        tree = {
            "model": {"base_model_path": str(model)},
            "data": {
                "dataset_type": "tests.benchmarks.packing:CountedFiles",
                "train_data_paths": [str(shard)],
                "max_seq_len": MAX_SEQ_LEN,
                "packing": True,
            },
            "trainer": {"micro_batch_size": 1, "global_batch_size": 1, "lr": 1e-3},
        }
        (folder / "config.yaml").write_text(json.dumps(tree))
        config = load_config(folder / "config.yaml", [])
        processor = Processor.build(config, None)
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        write_files(shard, processor, tokenizer, files)
        manifest = prepare(config).entries["train"][0]
        ratios = []
        for _ in range(repeats):
            plain, plain_tokens = plain_cpu(manifest, tokenizer, processor.end_id)
            packed, tokens, num_bytes = packed_cpu(config, manifest, processor)
            ratios.append((packed / tokens) / (plain / plain_tokens))
            print(
                f"code, CPU of a file and of a token: joined and cut {1e6 * plain / files:.0f} us, "
                f"{1e9 * plain / plain_tokens:.0f} ns; packed {1e6 * packed / files:.0f} us, {1e9 * packed / tokens:.0f} ns, and "
                f"{num_bytes / tokens:.1f} bytes a token on the wire"
            )
        print(f"packed : joined and cut, CPU a token: {np.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")


def main() -> None:
    """Both parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=1_000_000, help="that are planned; default: %(default)s")
    parser.add_argument("--files", type=int, default=1000, help="of code that are read; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", type=Path, help="folder with a tokenizer.json; default: the tiny one")
    arguments = parser.parse_args()
    plan_cost(arguments.records)
    row_cost(arguments.files, arguments.model, arguments.repeats)


if __name__ == "__main__":
    main()
