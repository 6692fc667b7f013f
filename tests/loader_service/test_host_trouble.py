"""Trouble of the host, injected into what every source opens and reads: never a verdict on data, and over when it is over.

Below a folder, `os.open`, `os.pread`, `os.preadv`, `open`, pyarrow and PyAV fail with an errno; or, for real, the process has no
descriptor left.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("av", reason="NOT TESTED: needs av; pip install 'stoker[lerobot]'")
pytest.importorskip("pyarrow", reason="NOT TESTED: needs pyarrow; pip install 'stoker[tables]'")

import pyarrow as pa
import pyarrow.parquet as pq

from loader_service.manifest import EntryManifest
from loader_service.pieces.encoder import RecordEncoder
from loader_service.pieces.piece import EncodedRecord
from loader_service.pieces.text_samples import Counting
from loader_service.prepare.run import Prepared, ScanOptions, prepare
from loader_service.prepare.verify import verify
from loader_service.sources.base import make_datasets
from stoker_proto.config import Config
from stoker_proto.errors import DataError, FetchError, HostError
from stoker_proto.processor import Processor
from tests.end_to_end.fleet import write_demonstrations
from tests.loader_service.sources.lerobot.files import write_lerobot
from tests.support.failing_host import failing, no_descriptors, raising
from tests.tiny_models import make_config, write_model_folder

ERRNOS = ("EMFILE", "ENFILE", "EIO", "ESTALE", "ENOMEM", "ETIMEDOUT", "ENOSPC", "EAGAIN", "ENOBUFS")
CHATS = [
    {"messages": [{"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": "Hello"}]} for n in range(6)
]
TEXTS = [{"text": f"text number {n}"} for n in range(6)]
CODE = [{"content": f"x = {n}\n", "lang": "python"} for n in range(6)]
OWN = "tests.loader_service.dataset_classes:Wrapping"


def lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def mani(folder: Path) -> Path:
    return write_demonstrations(folder, [3, 2, 4])


def stored(folder: Path) -> Path:
    shard = mani(folder)
    for path in folder.glob("*/obs.npz"):
        with np.load(path) as arrays:
            np.savez(path, rgb=arrays["rgb"])
    return shard


def images(folder: Path) -> Path:
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(folder / "a.png")
    rows = [{**row, "images": ["a.png"]} for row in CHATS]
    for row in rows:
        row["messages"] = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Black"}]
    return file("a.jsonl", lines(rows))(folder)


def file(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def parquet(rows: list[dict[str, Any]]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=3)
        return folder / "a.parquet"

    return write


def lerobot(version: str, **options: Any) -> Callable[[Path], Path]:
    return lambda folder: write_lerobot(folder / "set", (3, 2, 4), version=version, **options)


TOKENS = np.arange(3, 51, dtype=np.uint16)
CODE_ROWS = "data.options.validate=false"
SOURCES: dict[str, tuple[str, Callable[[Path], Path], tuple[str, ...]]] = {
    "mani_openpi, deflated": ("mani_openpi", mani, ()),
    "mani_openpi, stored": ("mani_openpi", stored, ()),
    "chat, lines": ("chat", file("a.jsonl", lines(CHATS)), ()),
    "chat, array": ("chat", file("a.json", json.dumps(CHATS).encode()), ()),
    "chat, parquet": ("chat", parquet(CHATS), ()),
    "chat, images": ("chat", images, ()),
    "chat, gzip": ("chat", file("a.jsonl.gz", gzip.compress(lines(CHATS))), ()),
    "text, lines": ("text", file("a.jsonl", lines(TEXTS)), ()),
    "text, parquet": ("text", parquet(TEXTS), ()),
    "text, Arrow": ("text", parquet(TEXTS), ("data.options.unpack_parquet=true",)),
    "text, plain": ("text", file("a.txt", b"One.\n\nTwo two.\n\nThree."), ("data.options.split=paragraphs",)),
    "text, tokens": ("text", file("a.bin", TOKENS.tobytes()), ("data.options.record_tokens=8",)),
    "code, lines": ("code", file("a.jsonl", lines(CODE)), ()),
    "code, parquet": ("code", parquet(CODE), ()),
    "lerobot, v2.1 video": ("lerobot", lerobot("v2.1", videos=["observation.images.front"]), ()),
    "lerobot, v3.0 video": ("lerobot", lerobot("v3.0", videos=["observation.images.front"]), ()),
    "lerobot, images": ("lerobot", lerobot("v3.0", videos=[]), ()),
    "a class that wraps errors": (OWN, mani, ()),
}


class Case:
    """A source, prepared, and what is read of it undisturbed."""

    def __init__(self, folder: Path, model: Path, kind: str, policy: str = "skip") -> None:
        dataset_type, write, overrides = SOURCES[kind]
        self.data, self.folder = folder / "data", folder
        self.is_mapped = "Arrow" in kind  # what is read there is read by no call
        self.data.mkdir()
        self.config: Config = make_config(
            model, f"data.dataset_type={dataset_type}", f"data.train_data_paths=[{write(self.data)}]",
            f"data.on_bad_sample={policy}", f"data.cache_dir={folder / 'cache'}", *overrides,
        )  # fmt: skip
        self.prepared: Prepared = prepare(self.config, scan=ScanOptions(processes=1))
        self.processor = Processor.build(self.config, self.prepared.codec)
        self.expected = self.encode(self.encoder())
        assert self.expected

    @property
    def manifest(self) -> EntryManifest:
        return self.prepared.entries["train"][0]

    def encoder(self) -> RecordEncoder:
        """One that has opened nothing yet."""
        return RecordEncoder(self.config.data, self.processor)

    def outcomes(self, encoder: RecordEncoder) -> list[Any]:
        return encoder.encode_all([(self.manifest, number) for number in range(self.manifest.num_records)], 0)

    def encode(self, encoder: RecordEncoder) -> list[tuple[list[int], tuple[bytes, ...]]]:
        outcomes = self.outcomes(encoder)
        assert all(isinstance(one, EncodedRecord) and one.error is None for one in outcomes), outcomes
        return [(sample.input_ids.tolist(), sample.images) for one in outcomes for sample in one.samples]

    def scan_anew(self, name: str) -> Prepared:
        data = replace(self.config.data, cache_dir=str(self.folder / name))
        return prepare(replace(self.config, data=data), scan=ScanOptions(processes=1))

    def verify(self) -> list[str]:
        (dataset,) = make_datasets(self.config.data)
        counting = Counting.needed(self.config, dataset)
        return verify([self.manifest], dataset, processes=1, progress=False, counting=counting)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=list(SOURCES))
def case(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case"), model, request.param)


@pytest.mark.long
@pytest.mark.parametrize("operation", ["open", "read"])
def test_no_errno_of_the_host_is_a_verdict_and_the_next_attempt_succeeds(case: Case, operation: str) -> None:
    for name in (*ERRNOS, "MemoryError"):
        encoder = case.encoder()
        # What is unpacked is read from the cache folder, and what stands in it is of the loader's own making.
        with failing(case.folder, operation, raising(name)) as hit:
            outcomes = case.outcomes(encoder)
        if not hit:  # e.g. pyarrow reads by itself
            assert operation == "read"
            continue
        bad = [one for one in outcomes if not isinstance(one, EncodedRecord)]
        assert bad or (operation == "read" and case.is_mapped), f"{name} was not noticed"
        assert all(isinstance(one, FetchError) for one in bad), f"{name}: {bad}"
        assert not [one for one in outcomes if isinstance(one, EncodedRecord) and one.error is not None], name
        assert case.encode(encoder) == case.expected


@pytest.mark.long
@pytest.mark.parametrize("operation", ["open", "read"])
def test_a_scan_keeps_no_verdict_that_the_host_made(case: Case, operation: str) -> None:
    for name in ("EMFILE", "EIO", "MemoryError"):
        with failing(case.data, operation, raising(name)) as hit, ExitStack() as stack:
            stack.enter_context(pytest.raises(HostError))
            case.scan_anew(f"cache-{operation}-{name}")
            if not hit:  # pyarrow reads by itself
                assert operation == "read"
                raise HostError("nothing was struck")
        assert case.scan_anew(f"cache-{operation}-{name}").entries["train"][0].num_bad == 0


def test_verify_ends_and_calls_nothing_bad(case: Case) -> None:
    assert case.verify() == []
    with failing(case.folder, "open", raising("EIO")) as hit:
        try:
            problems = case.verify()
        except HostError:
            problems = []
    assert hit
    assert problems == []


def test_a_process_without_descriptors_skips_nothing(case: Case) -> None:
    encoder = case.encoder()
    encoder.preload([case.manifest])
    with no_descriptors():
        outcomes = case.outcomes(encoder)
    assert {type(one) for one in outcomes} == {HostError}
    assert "EMFILE" in str(outcomes[0])
    assert case.encode(encoder) == case.expected


@pytest.mark.parametrize("name", ["ENOENT", "EACCES", "EISDIR"])
def test_what_is_said_of_the_data_is_still_a_verdict(model: Path, tmp_path: Path, name: str) -> None:
    case = Case(tmp_path, model, "mani_openpi, deflated", policy="fail")
    with failing(case.data, "open", raising(name)):
        outcomes = case.outcomes(case.encoder())
    assert {type(one) for one in outcomes} == {DataError}
