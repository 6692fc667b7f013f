"""`data.sources` beside the short form: which entries there are, what they are called, what is refused."""

from pathlib import Path

import pytest
import yaml

from stoker_proto.config import DataConfig
from stoker_proto.config.reader import config_from_tree, config_to_tree, load_config
from stoker_proto.errors import ConfigError

ROBOT = {"dataset_type": "mani_openpi", "paths": ["a.jsonl", "b.jsonl"], "val_paths": ["v.jsonl"], "weight": 3}
CHAT = {"dataset_type": "my_package.chats:Chats", "paths": "chats.jsonl", "weight": 1, "options": {"learn": "last"}}


def read(folder: Path, **data: object) -> DataConfig:
    tree = {
        "model": {"base_model_path": "m"},
        "data": {"max_seq_len": 64, **data},
        "trainer": {"micro_batch_size": 1, "global_batch_size": 1, "lr": 1e-3},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(folder / "config.yaml")
    assert config_from_tree(config_to_tree(config)) == config
    return config.data


def test_entries_are_numbered_source_after_source(tmp_path: Path) -> None:
    data = read(tmp_path, sources=[ROBOT, CHAT])
    assert data.paths("train") == ("a.jsonl", "b.jsonl", "chats.jsonl")
    assert data.entry_sources("train") == (0, 0, 1)
    assert (data.paths("val"), data.entry_sources("val")) == (("v.jsonl",), (0,))
    assert data.path_key("train", 2) == "data.sources[1].paths[0]"
    assert data.path_key("val", 0) == "data.sources[0].val_paths[0]"
    assert data.source_names() == ("mani_openpi", "Chats")


def test_one_source_alone_is_the_short_form(tmp_path: Path) -> None:
    data = read(tmp_path, sources=[ROBOT, CHAT]).of_source(1)
    assert data == read(
        tmp_path,
        dataset_type="my_package.chats:Chats",
        train_data_paths=["chats.jsonl"],
        options={"learn": "last"},
    )
    assert data.all_sources()[0].paths == data.paths("train") == ("chats.jsonl",)
    assert data.path_key("train", 0) == "data.train_data_paths[0]"


def test_names_are_given_or_told_apart_by_number(tmp_path: Path) -> None:
    named = {**ROBOT, "name": "bridge"}
    assert read(tmp_path, sources=[ROBOT, named, CHAT, ROBOT]).source_names() == (
        "mani_openpi_0",
        "bridge",
        "Chats",
        "mani_openpi_3",
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"sources": [ROBOT], "dataset_type": "mani_openpi"}, "data.dataset_type stands beside data.sources"),
        ({"sources": [ROBOT], "train_data_paths": ["x"]}, "data.train_data_paths stands beside data.sources"),
        ({"sources": [ROBOT], "options": {"a": 1}}, "data.options stands beside data.sources"),
        ({}, "data.dataset_type is missing: name one, or list several under data.sources"),
        ({"dataset_type": "mani_openpi"}, "data.train_data_paths is empty"),
        ({"sources": [ROBOT, {**CHAT, "paths": []}]}, r"data.sources\[1\].paths is empty"),
        ({"sources": [ROBOT, {**CHAT, "weight": 0}]}, r"data.sources\[1\].weight is 0.0: it must be above 0"),
        ({"sources": [ROBOT, {**CHAT, "weight": None}]}, r"data.sources\[1\].weight is missing: give every source"),
        (
            {"sources": [{**ROBOT, "name": "a"}, {**CHAT, "name": "a"}]},
            r"data.sources\[1\].name is 'a', as that of another",
        ),
        ({"sources": [{**ROBOT, "wieght": 2}]}, r"data.sources\[0\].wieght: unknown key; did you mean"),
        ({"sources": [{"paths": ["x"]}]}, r"data.sources\[0\].dataset_type is missing"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, data: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, **data)
