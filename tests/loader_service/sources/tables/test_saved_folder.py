"""Arrow files and folders as the datasets library writes them: streams of record batches, with descriptions beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from loader_service.prepare.run import prepare
from loader_service.sources.base import BaseSFTDataset, Sample
from loader_service.sources.tables.dataset import TableDataset
from stoker_proto.config import Config
from stoker_proto.errors import ConfigError, DataError
from tests.tiny_models import make_config, write_model_folder

MakeTables = Callable[..., TableDataset]
ReadShard = Callable[[BaseSFTDataset, Path], list[Sample]]


def dialogues(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}],
            "score": float(i),
        }
        for i in range(first, first + count)
    ]


def write_arrow(path: Path, rows: list[dict[str, Any]], *, batch_rows: int = 2, as_file: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    new = pa.ipc.new_file if as_file else pa.ipc.new_stream
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=batch_rows)
    return path


def save_to_disk(folder: Path, shards: list[list[dict[str, Any]]]) -> Path:
    """What `Dataset.save_to_disk` of datasets 5.2 leaves there."""
    names = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        write_arrow(folder / name, rows)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "aa8103a3869f84ff", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}, "splits": None}))
    return folder


def answers(samples: list[Sample]) -> list[str]:
    return [sample.turns[-1].text for sample in samples]


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("options", [{}, {"validate": True}, {"unpack_parquet": True}])
def test_arrow_files_are_tables(
    as_file: bool, options: dict[str, Any], tmp_path: Path, make_tables: MakeTables, read_shard: ReadShard
) -> None:
    shard = write_arrow(tmp_path / "a.arrow", dialogues(5), as_file=as_file)
    dataset = make_tables("chat", **options)
    assert answers(read_shard(dataset, shard)) == ["a0", "a1", "a2", "a3", "a4"]
    assert dataset.where(shard, 3) == (str(shard), "row 3")


def test_columns_that_are_not_read_are_named(tmp_path: Path, make_tables: MakeTables) -> None:
    shard = write_arrow(tmp_path / "a.arrow", dialogues(3))
    records = list(make_tables("chat", validate=True).scan(shard))
    assert [record.notes for record in records] == [("not read: field 'score'",)] * 3


def test_a_saved_folder_is_an_entry(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "chats", [dialogues(3), dialogues(2, first=3)])
    write_arrow(folder / "cache-0123456789abcdef.arrow", dialogues(9))  # left by `map`
    config = chat_config(tmp_path, folder)
    entry = prepare(config).entries["train"][0]
    assert [Path(shard).name for shard in entry.shards] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert entry.num_records == 5


def test_the_cache_of_datasets_is_an_entry(tmp_path: Path) -> None:
    folder = tmp_path / "0.0.0"
    write_arrow(folder / "json-train.arrow", dialogues(4))
    write_arrow(folder / "cache-ae5db4aed30fdcd8.arrow", dialogues(9))
    (folder / "dataset_info.json").write_text("{}")
    assert prepare(chat_config(tmp_path, folder)).entries["train"][0].num_records == 4


def test_a_folder_of_splits_asks_for_one(tmp_path: Path) -> None:
    for split in ("train", "test"):
        save_to_disk(tmp_path / "chats" / split, [dialogues(2)])
    (tmp_path / "chats" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(
        ConfigError, match=r"chats holds splits \(dataset_dict\.json\): name the one .*chats/train, .*test"
    ):
        prepare(chat_config(tmp_path, tmp_path / "chats"))
    assert prepare(chat_config(tmp_path, tmp_path / "chats" / "test")).entries["train"][0].num_records == 2


def test_what_is_missing_of_a_saved_folder_is_named(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "chats", [dialogues(2), dialogues(2)])
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ConfigError, match=r"state\.json names data-00001-of-00002\.arrow, and there is no such file"):
        prepare(chat_config(tmp_path, folder))


def test_a_description_is_no_data(tmp_path: Path) -> None:
    """Alone in a folder, as in the repository of a data set whose files lie below; and beside data, as LLaMA-Factory has it."""
    folder = tmp_path / "repository"
    (folder / "plain_text").mkdir(parents=True)
    described = folder / "dataset_info.json"
    described.write_text('{"alpaca": {"file_name": "chats.json"}}')
    for named in (folder, described):
        with pytest.raises(
            ConfigError,
            match=r"dataset_info\.json describes a data set and holds no row of it: name the files of the data, or their folder; "
            "it has the folders plain_text$",
        ):
            prepare(chat_config(tmp_path, named))
    (folder / "chats.json").write_text(json.dumps(dialogues(3)))
    entry = prepare(chat_config(tmp_path, folder)).entries["train"][0]
    assert [Path(shard).name for shard in entry.shards] == ["chats.json"]
    assert entry.num_records == 3


def test_a_selection_of_rows_is_refused(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "chats", [dialogues(2)])
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "_indices_data_files": [{"filename": "indices.arrow"}]}))
    with pytest.raises(ConfigError, match=r"it selects rows by indices: save it again with flatten_indices\(\)"):
        prepare(chat_config(tmp_path, folder))


def test_a_stream_that_is_cut_short_is_named(tmp_path: Path, make_tables: MakeTables) -> None:
    """Also between two batches, where pyarrow reads it as a shorter one."""
    whole = write_arrow(tmp_path / "a.arrow", dialogues(6)).read_bytes()
    cut = 0
    for size in range(8, len(whole), 8):
        (tmp_path / "a.arrow").write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"a\.arrow: (no whole Arrow stream: its \d+ bytes|unreadable Arrow file)"):
            list(make_tables("chat").scan(tmp_path / "a.arrow"))
        cut += 1
    assert cut > 50


def test_something_else_is_named(tmp_path: Path, make_tables: MakeTables) -> None:
    (tmp_path / "a.arrow").write_bytes(b"neither a stream nor a file")
    with pytest.raises(DataError, match=r"a\.arrow: no whole Arrow stream"):
        list(make_tables("chat").scan(tmp_path / "a.arrow"))
    (tmp_path / "b.arrow").write_bytes(b"ARROW1 and nothing more")
    with pytest.raises(DataError, match=r"b\.arrow: unreadable Arrow file"):
        list(make_tables("chat").scan(tmp_path / "b.arrow"))


def chat_config(tmp_path: Path, folder: Path) -> Config:
    model = write_model_folder(tmp_path / "model", "causal")
    return make_config(model, "data.dataset_type=chat", f"data.train_data_paths=[{folder}]")
