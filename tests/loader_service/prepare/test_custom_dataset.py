"""A dataset class from outside the repo, named by its dotted path: the same preparation, by the public interface alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loader_service.prepare import scan_pool
from loader_service.prepare.run import ScanOptions, prepare
from loader_service.prepare.verify import verify
from loader_service.sources.base import make_dataset
from stoker_proto.config import Config
from stoker_proto.errors import ConfigError, DataError

MakeConfig = Callable[..., Config]

CAPTIONS = '''
from contextlib import contextmanager

from loader_service.sources.base import BaseSFTDataset, Sample, ScannedRecord

class Captions(BaseSFTDataset):
    """A row is a line `question|answer`; a record is a row number."""

    shard_patterns = ("*.txt",)

    def scan(self, shard):
        for row, line in enumerate(shard.read_text().splitlines()):
            yield ScannedRecord(offset=row, size=1, num_samples=1)

    def read(self, shard, offset, size):
        question, answer = shard.read_text().splitlines()[offset].split("|")
        yield Sample(instruction=question, answer=answer)

class Broken(Captions):
    def scan(self, shard):
        yield ScannedRecord(offset=-1, size=1, num_samples=1)

class Raising(Captions):
    def scan(self, shard):
        raise RuntimeError("no idea what this is")

class Careless(Captions):
    def read(self, shard, offset, size):
        yield Sample(instruction={}["word"], answer="x")

class Held(Captions):
    held = 0

    @contextmanager
    def reading(self):
        with super().reading():
            self.held += 1
            try:
                yield
            finally:
                self.held -= 1

    def cut(self, shard, part_bytes):
        assert self.held == 1
        return super().cut(shard, part_bytes)

    def scan(self, shard):
        assert self.held == 1
        return super().scan(shard)

class Unequal(Captions):
    def read(self, shard, offset, size):
        yield from super().read(shard, offset, size)
        yield from super().read(shard, offset, size)
'''


@pytest.fixture
def captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    package = tmp_path / "package"
    package.mkdir()
    (package / "my_captions.py").write_text(CAPTIONS)
    monkeypatch.syspath_prepend(str(package))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("what is this?|a cube\nand this?|a peg\n")
    (tmp_path / "data" / "b.txt").write_text("one more?|no\n")
    yield tmp_path / "data"
    sys.modules.pop("my_captions", None)


def test_it_is_prepared_and_read(captions: Path, make_config: MakeConfig) -> None:
    config = make_config(captions, dataset_type="my_captions:Captions")
    prepared = prepare(config)
    entry = prepared.entries["train"][0]
    assert (entry.num_records, entry.total_samples, entry.offsets.tolist()) == (3, 3, [0, 1, 0])
    assert prepared.codec is None
    assert prepared.statistics is None
    dataset = make_dataset(config.data)
    (sample,) = dataset.read(Path(entry.shards[0]), int(entry.offsets[1]), int(entry.sizes[1]))
    assert (sample.instruction, sample.answer) == ("and this?", "a peg")
    assert verify([entry], dataset, processes=1, progress=False) == []


def test_what_it_raises_is_a_problem_of_each_record(captions: Path, make_config: MakeConfig) -> None:
    config = make_config(captions / "a.txt", dataset_type="my_captions:Careless")
    problems = verify([prepare(config).entries["train"][0]], make_dataset(config.data), processes=1, progress=False)
    file = captions / "a.txt"
    assert problems == [f"{file}: record {n}: Careless failed: KeyError: 'word'" for n in (0, 1)]


@pytest.mark.process
def test_other_processes_find_it_too(captions: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_pool, "MIN_POOL_BYTES", 0)
    prepared = prepare(make_config(captions, dataset_type="my_captions:Captions"), scan=ScanOptions(processes=2))
    assert prepared.entries["train"][0].num_records == 3


def test_text_needs_no_codec_from_a_loader_that_holds_a_part(captions: Path, make_config: MakeConfig) -> None:
    config = make_config(captions / "a.txt", captions / "b.txt", dataset_type="my_captions:Captions")
    assert prepare(config, held={"train": [1]}).codec is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Broken", "a.txt: record at offset -1: Broken.scan gave offset -1: 0 to 9223372036854775807 can be kept"),
        ("Raising", "a.txt: Raising.scan failed: RuntimeError: no idea what this is"),
    ],
)
def test_what_it_does_wrong_is_named(captions: Path, make_config: MakeConfig, name: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        prepare(make_config(captions, dataset_type=f"my_captions:{name}"))
    assert str(caught.value).endswith(said)


def test_a_scan_of_local_files_is_in_a_block_of_reading(captions: Path, make_config: MakeConfig) -> None:
    """As a read is: what a class holds open there is closed again."""
    assert prepare(make_config(captions, dataset_type="my_captions:Held")).entries["train"][0].num_records == 3


def test_verify_compares_what_read_gives(captions: Path, make_config: MakeConfig) -> None:
    config = make_config(captions, dataset_type="my_captions:Unequal")
    entry = prepare(config).entries["train"][0]
    problems = verify([entry], make_dataset(config.data), processes=1, progress=False)
    assert len(problems) == 3
    assert problems[0] == f"{captions / 'a.txt'}: record 0: it gives 2 samples, and the scan counted 1"


def test_a_type_that_is_none_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"data\.dataset_type is 'absent_package:Nothing': it cannot be imported"):
        prepare(make_config("x", dataset_type="absent_package:Nothing"))


@pytest.mark.parametrize(
    ("name", "is_missing"),
    [("absent_package:Nothing", True), ("loader_service.absent:Nothing", True), ("json:Nothing", False)],
)
def test_a_class_in_the_working_folder_is_told_how_it_is_found(
    name: str, is_missing: bool, make_config: MakeConfig
) -> None:
    """The console scripts do not look into the working folder as `python program.py` does."""
    with pytest.raises(ConfigError, match="it cannot be imported") as caught:
        prepare(make_config("x", dataset_type=name))
    assert ("put PYTHONPATH=. in front of the command" in str(caught.value)) == is_missing
    assert ("(pip install -e ." in str(caught.value)) == is_missing


def test_a_package_that_the_class_itself_needs_is_another_matter(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_missing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"No module named 'a_package_that_is_missing'\)$"):
        prepare(make_config("x", dataset_type="needs_more:Nothing"))
