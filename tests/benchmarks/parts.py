"""Encode, tokenise, pack and client, each as one call, on the shipped demonstrations and on 64 dialogues. One thread.

parts = Parts(folder, "robot")          # or "chat", "packed"; `write_inputs(folder)` made the folder
frames = parts.pack(parts.encode())
parts.batches(frames)
"""

from __future__ import annotations

import json
from pathlib import Path

from loader_service.disk_cache.store import DiskCache
from loader_service.manifest import EntryManifest
from loader_service.pieces.caching_encoder import CachingEncoder
from loader_service.pieces.encoder import RecordEncoder
from loader_service.pieces.excluded import Excluded
from loader_service.pieces.piece import EncodedRecord, assemble_piece
from loader_service.pieces.sample_values import stacked
from loader_service.pieces.text_samples import TextSample, rows_of
from loader_service.plan.lane_plan import PlanKey
from loader_service.plan.plan_files import make_plan
from loader_service.prepare.run import prepare
from loader_service.sources.base import make_dataset
from stoker_proto.errors import DataError
from stoker_proto.processor import EncodedRow, Processor
from stoker_proto.wire.encoding import decode, encode
from stoker_proto.wire.messages import Piece, Ticket
from tests.tiny_models import make_config, write_model_folder
from trainer.feed.batch import BatchBuilder

ROOT = Path(__file__).resolve().parents[2]
ROWS = 8
"""Rows of a piece."""


def write_inputs(folder: Path) -> None:
    """The models' folders and the dialogues."""
    write_chats(folder / "chats.jsonl")
    for family in ("llava", "causal"):
        (folder / family).mkdir(exist_ok=True)
        write_model_folder(folder / family, family)


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


class Parts:
    """The parts over one kind of data."""

    def __init__(self, folder: Path, data: str) -> None:
        robot = data == "robot"
        shards = ROOT / "tests" / "data" / "maniskill" / "val.jsonl" if robot else folder / "chats.jsonl"
        self.config = make_config(
            folder / ("llava" if robot else "causal"),
            f"data.dataset_type={'mani_openpi' if robot else 'chat'}",
            f"data.train_data_paths=[{shards}]",
            f"data.cache_dir={folder / 'cache'}",
            "data.max_seq_len=1024",
            "data.order.lanes=1",
            f"data.packing={'true' if data == 'packed' else 'false'}",
        )
        prepared = prepare(self.config, splits=("train",))
        self.processor = Processor.build(self.config, prepared.codec)
        self.manifest = prepared.entries["train"][0]
        self.plan = make_plan(self.manifest, self.config.data, PlanKey("train", 0, 0))
        dataset = make_dataset(self.config.data)
        self._samples = [
            list(dataset.read(*self.manifest.place(record))) for record in range(self.manifest.num_records)
        ]

    @property
    def num_samples(self) -> int:
        """Of one pass."""
        return self.manifest.total_samples

    def encode(self) -> dict[int, EncodedRecord]:
        """Every record, encoded."""
        encoder = RecordEncoder(self.config.data, self.processor)
        return {record: encoder.encode(self.manifest, record, 0) for record in range(self.manifest.num_records)}

    def keeping(self, folder: Path) -> CachingEncoder:
        """An encoder whose cache on disk holds every record."""
        config = self.config
        disk = DiskCache(folder, 1 << 30)
        encoder = CachingEncoder(config.data, self.processor, config.loader, Excluded.read(config.data), disk)
        encoder.encode_all(self.places, 0)
        return encoder

    @property
    def places(self) -> list[tuple[EntryManifest, int]]:
        """All records."""
        return [(self.manifest, record) for record in range(self.manifest.num_records)]

    def tokenise(self) -> list[EncodedRow]:
        """The rows of all samples, whose frames and texts were read before."""
        rows: list[EncodedRow] = []
        for samples in self._samples:
            texts = [text for sample in samples if (text := TextSample.of(sample)) is not None]
            for found in rows_of(texts, self.processor) if texts else ():
                assert not isinstance(found, DataError)
                rows += found
            actions = [sample.action for sample in samples if sample.action is not None]
            if actions:
                assert self.processor.codec is not None
                codes = self.processor.codec.encode(stacked(actions))
                rows += [
                    self.processor.encode(sample.instruction, len(sample.images), codes=code)
                    for sample, code in zip(samples, codes, strict=True)
                ]
        return rows

    def tickets(self) -> list[Ticket]:
        """Of one epoch."""
        length = self.plan.lane_length(0)
        return [
            Ticket(ticket=n, split="train", epoch=0, lane=0, start=start, count=min(ROWS, length - start))
            for n, start in enumerate(range(0, length, ROWS))
        ]

    def pack_one(self, ticket: Ticket, records: dict[int, EncodedRecord]) -> bytes:
        """The frame of one piece."""
        rows = self.plan.rows(0, ticket.start, ticket.count)
        return encode(assemble_piece(ticket, "l", 0, rows, records, records[0].samples[0]))

    def pack(self, records: dict[int, EncodedRecord]) -> list[bytes]:
        """The frames of an epoch's pieces."""
        return [self.pack_one(ticket, records) for ticket in self.tickets()]

    def builder(self) -> BatchBuilder:
        """What makes micro-batches of pieces."""
        return BatchBuilder(decoder=self.processor, num_rows=ROWS, max_tokens=1024, packing=self.config.data.packing)

    def batches(self, frames: list[bytes]) -> None:
        """Each frame becomes a micro-batch."""
        builder = self.builder()
        for frame in frames:
            piece = decode(frame)
            assert isinstance(piece, Piece)
            builder([piece])
