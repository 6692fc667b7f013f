"""YAML text to Config: what is read as meant, what is refused and in which words."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from stoker_proto.config import Config
from stoker_proto.config.reader import config_to_tree, load_config
from stoker_proto.errors import ConfigError

# The page that defines the project, key by key.
PAGE = """
cluster:
  num_nodes: 1
  component_placement:
    trainer: 0-3
    dataloader: 4-7
model:
  base_model_path: /models/base
  gradient_checkpointing: true
data:
  dataset_type: mani_openpi
  train_data_paths:
    - /data/train.jsonl
  val_data_paths:
    - /data/val.jsonl
  max_seq_len: 2048
trainer:
  micro_batch_size: 4
  global_batch_size: 64
  lr: 2e-5
  epochs: 3
  eval_interval: 500
  logger:
    wandb: false
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(PAGE)
    return file


def read(folder: Path, text: str) -> Config:
    file = folder / "config.yaml"
    file.write_text(text)
    return load_config(file)


def test_the_page_is_read_as_meant(page: Path) -> None:
    config = load_config(page)
    assert config.cluster.num_nodes == 1
    assert config.cluster.component_placement.trainer == (0, 1, 2, 3)
    assert config.cluster.component_placement.dataloader == (4, 5, 6, 7)
    assert config.model.base_model_path == "/models/base"
    assert config.model.gradient_checkpointing is True
    assert config.data.dataset_type == "mani_openpi"
    assert config.data.train_data_paths == ("/data/train.jsonl",)
    assert config.data.val_data_paths == ("/data/val.jsonl",)
    assert config.data.max_seq_len == 2048
    assert (config.trainer.micro_batch_size, config.trainer.global_batch_size) == (4, 64)
    assert config.trainer.lr == 0.00002
    assert (config.trainer.epochs, config.trainer.eval_interval) == (3, 500)
    assert config.trainer.logger.wandb is False


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("trainer.lr=2e-5", "trainer.lr", 2e-5),  # text to YAML 1.1
        ("trainer.lr=2E-05", "trainer.lr", 2e-5),
        ("trainer.lr='1e-4'", "trainer.lr", 1e-4),
        ("trainer.lr=1", "trainer.lr", 1.0),
        ("trainer.lr = 3e-4", "trainer.lr", 3e-4),
        ("trainer.epochs='7'", "trainer.epochs", 7),
        ("trainer.max_steps=null", "trainer.max_steps", None),
        ("trainer.max_steps=12", "trainer.max_steps", 12),
        ("trainer.betas=[0.9, 0.999]", "trainer.betas", (0.9, 0.999)),
        ("cluster.component_placement.trainer=4", "cluster.component_placement.trainer", (4,)),
        ("cluster.component_placement.trainer=4-7", "cluster.component_placement.trainer", (4, 5, 6, 7)),
        ("cluster.component_placement.dataloader=0,2-3", "cluster.component_placement.dataloader", (0, 2, 3)),
        ("model.base_model_path=007", "model.base_model_path", "007"),
        ("model.base_model_path=2026", "model.base_model_path", "2026"),
        ("trainer.output_dir=2026-01-31", "trainer.output_dir", "2026-01-31"),
        ("trainer.epochs=010", "trainer.epochs", 10),  # eight to YAML 1.1
        ("trainer.epochs=+3", "trainer.epochs", 3),
        ("data.options={a: 1e3, b: 2e-5, c: .5, d: 5.}", "data.options", {"a": 1e3, "b": 2e-5, "c": 0.5, "d": 5.0}),
        ("data.options={a: 1:30, b: 010, c: 2026-01-31}", "data.options", {"a": "1:30", "b": "010", "c": "2026-01-31"}),
        (
            "data.options={n: 0, minus: -4, yes: no, none: ~}",
            "data.options",
            {"n": 0, "minus": -4, True: False, "none": None},
        ),
        ("data.train_data_paths=/one.jsonl", "data.train_data_paths", ("/one.jsonl",)),
        ("data.train_data_paths=[/a, /b]", "data.train_data_paths", ("/a", "/b")),
        ("data.action.codec=bins", "data.action.codec", "bins"),
        ("data.action.unmasked=[]", "data.action.unmasked", ()),
        ("data.action.codec_options={levels: 4}", "data.action.codec_options", {"levels": 4}),
        ("data.augment.enabled=true", "data.augment.enabled", True),
        ("data.options={anything: [1, x]}", "data.options", {"anything": [1, "x"]}),
        ("trainer.zero_stage=2", "trainer.zero_stage", 2),
        ("trainer.zero_stage=auto", "trainer.zero_stage", "auto"),
        ("trainer.checkpoint.resume=null", "trainer.checkpoint.resume", None),
        ("cluster.loader_addresses=[tcp://a:1,tcp://b:2]", "cluster.loader_addresses", ("tcp://a:1", "tcp://b:2")),
        ('cluster.loader_addresses=["tcp://a:1"]', "cluster.loader_addresses", ("tcp://a:1",)),
        ("model.base_model_path=a=b", "model.base_model_path", "a=b"),
    ],
)
def test_a_value_is_read_as_its_key_means_it(page: Path, override: str, path: str, value: object) -> None:
    overrides = [override, "trainer.global_batch_size=64", "trainer.micro_batch_size=4"]
    found: Any = load_config(page, overrides)
    for key in path.split("."):
        found = getattr(found, key)
    assert found == value
    assert type(found) is type(value)


def test_overrides_are_applied_in_order_and_win_over_the_file(page: Path) -> None:
    assert load_config(page, ["trainer.lr=1e-3", "trainer.lr=1e-4"]).trainer.lr == 1e-4


def test_an_override_reaches_a_section_that_the_file_does_not_have(page: Path) -> None:
    assert load_config(page, ["trainer.feed.prefetch=9"]).trainer.feed.prefetch == 9
    assert load_config(page, ["loader={workers: 3}"]).loader.workers == 3


def test_an_empty_section_means_its_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, PAGE + "loader:\n").loader.workers == 0
    assert load_config(tmp_path / "config.yaml", ["loader.workers=2"]).loader.workers == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # A typo names the nearest key.
        ("trainer.micro_batchsize=4", "trainer.micro_batchsize: unknown key; did you mean trainer.micro_batch_size?"),
        ("model.gradient_checkpoint=true", "unknown key; did you mean model.gradient_checkpointing?"),
        ("data.image.qualty=90", "data.image.qualty: unknown key; did you mean data.image.quality?"),
        ("traner.lr=1", "traner: unknown key; did you mean trainer?"),
        ("data.zzz=1", "data.zzz: unknown key; known here: dataset_type, train_data_paths"),
        ("cluster.component_placement.rollout=0", "cluster.component_placement.rollout: unknown component"),
        # A wrong type says which is expected.
        ("trainer.epochs=2.5", "trainer.epochs is 2.5: a whole number is expected"),
        ("trainer.epochs=two", "trainer.epochs is 'two': a whole number is expected"),
        ("trainer.epochs=true", "trainer.epochs is True: a whole number is expected"),
        ("trainer.epochs=", "trainer.epochs is None: a whole number is expected"),
        ("trainer.epochs=[1]", r"trainer.epochs is \[1\]: a whole number is expected"),
        ("trainer.lr=fast", "trainer.lr is 'fast': a number is expected"),
        ("trainer.lr=true", "trainer.lr is True: a number is expected"),
        ("trainer.lr=.inf", "trainer.lr is inf: a finite number is expected"),
        ("trainer.lr=nan", "trainer.lr is 'nan': a finite number is expected"),
        ("model.gradient_checkpointing=1", "model.gradient_checkpointing is 1: true or false is expected"),
        ("model.gradient_checkpointing='yes'", "model.gradient_checkpointing is 'yes': true or false is expected"),
        ("model.base_model_path=[a]", r"model.base_model_path is \['a'\]: text"),
        ("model.base_model_path=1.10", r"model.base_model_path is 1.1: text \(in quotes\) is expected"),
        ("model.base_model_path=true", r"model.base_model_path is True: text \(in quotes\) is expected"),
        ("trainer.epochs=--5", "trainer.epochs is '--5': a whole number is expected"),
        ("trainer.epochs=²", "trainer.epochs is '²': a whole number is expected"),
        ("trainer.epochs=0x10", "trainer.epochs is '0x10': a whole number is expected"),
        ("trainer.lr=" + "9" * 400, "a number is expected"),
        ("trainer.zero_stage=2.0", "trainer.zero_stage is 2.0: choose one of 1, 2, 3, auto"),
        ("data.train_data_paths=3", "data.train_data_paths is 3: a list is expected"),
        ("data.train_data_paths={a: b}", "data.train_data_paths is {'a': 'b'}: a list is expected"),
        ("data.train_data_paths=[a, [b]]", r"data.train_data_paths\[1\] is \['b'\]: text"),
        ("trainer.betas=[0.9]", r"trainer.betas is \[0.9\]: 2 values are expected"),
        ("data.action.codec=fsq", "data.action.codec is 'fsq': choose one of vq, bins, fast"),
        ("trainer.zero_stage=true", "trainer.zero_stage is True: choose one of 1, 2, 3, auto"),
        ("trainer.zero_stage=4", "trainer.zero_stage is 4: choose one of 1, 2, 3, auto"),
        ("data.options=3", "data.options is 3: a mapping is expected"),
        ("trainer.logger=3", "trainer.logger is 3: a mapping of keys is expected"),
        ("cluster.component_placement=4", "cluster.component_placement is 4: write {trainer: 0-3, dataloader: 4-7}"),
        # Slots.
        ("cluster.component_placement.trainer=a-b", "slots are written `4-7`, `0,2` or `4`"),
        ("cluster.component_placement.trainer=7-4", "a range runs upwards"),
        ("cluster.component_placement.trainer=0,0", "a slot is named twice"),
        ("cluster.component_placement.trainer=true", "slots are written"),
        ("cluster.component_placement.trainer=-1", "slots are written"),
        ("cluster.component_placement.trainer=0-²", "slots are written"),
        ("cluster.component_placement.trainer=0-9999999999", "slots are written"),
        ("cluster.component_placement.trainer=0-99999999", "a range runs upwards"),
        ("cluster.component_placement.trainer=1.5", "slots are written"),
        ("cluster.component_placement.trainer=0..3", "slots are written"),
        # The override itself.
        ("trainer.lr", r"--set 'trainer.lr': write it as a.b=value"),
        ("=3", "write it as a.b=value"),
        ("trainer..lr=3", "write it as a.b=value"),
        ("trainer.lr.peak=3", "lr holds a value, not keys"),
        ("data.options=[1", "--set data.options:1:3: not YAML"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(page: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(page, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["model.base_model_path", "data.max_seq_len", "trainer.lr"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    tree = yaml.safe_load(PAGE)
    section, name = key.split(".")
    del tree[section][name]
    with pytest.raises(ConfigError, match=f"{key} is missing: it has no default, set it in the file or with --set"):
        read(tmp_path, yaml.safe_dump(tree))


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model is missing"):
        read(
            tmp_path,
            PAGE.replace("model:", "loader:")
            .replace("  base_model_path: /models/base\n", "")
            .replace("  gradient_checkpointing: true\n", "  workers: 1\n"),
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a mapping with cluster, model, data, trainer is expected, not NoneType"),
        ("- a\n- b\n", "a mapping with cluster, model, data, trainer is expected, not list"),
        ("trainer: {lr: 1\n", "config.yaml:2:1: not YAML"),
        ("trainer:\n\tlr: 1\n", "config.yaml:2:1: not YAML"),
        ("1: 2\n" + PAGE, "1: unknown key"),
        ("!!python/object/apply:os.system ['true']\n", "not YAML: could not determine a constructor"),
        (PAGE + "trainer:\n  lr: 1\n", "config.yaml:25:1: not YAML: the key trainer stands twice"),
        (
            PAGE.replace("  epochs: 3\n", "  epochs: 3\n  epochs: 5\n"),
            "config.yaml:22:3: not YAML: the key epochs stands twice",
        ),
    ],
)
def test_a_file_that_is_no_config_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml: the configuration cannot be read .* name a YAML file"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(binary)


def test_a_config_goes_through_its_tree_and_back(page: Path, tmp_path: Path) -> None:
    """What a checkpoint stores is plain data from which the same config is read again."""
    config = load_config(page, ["data.action.codec_options={levels: 4}", "trainer.max_steps=5"])
    tree = config_to_tree(config)
    assert json.loads(json.dumps(tree)) == tree
    assert tree["trainer"]["lr"] == 2e-5
    assert read(tmp_path, yaml.safe_dump(tree)) == config


def test_yaml_merge_keys_are_no_repetition(tmp_path: Path) -> None:
    text = PAGE.replace("  logger:\n", "  <<: {epochs: 9, weight_decay: 0.1}\n  logger:\n")
    config = read(tmp_path, text)
    assert (config.trainer.epochs, config.trainer.weight_decay) == (3, 0.1)


def test_every_option_has_a_meaning_in_words() -> None:
    """A string literal stands under each field, as the house style asks."""
    import ast
    import re

    from stoker_proto import config as package

    sections = {"ImageConfig", "AugmentConfig", "ActionConfig", "DialogueConfig"}
    (folder,) = map(Path, package.__path__)
    nodes = [node for file in sorted(folder.glob("*.py")) for node in ast.parse(file.read_text()).body]
    classes = [
        node for node in nodes if isinstance(node, ast.ClassDef) and re.fullmatch(r"(?:[A-Z]\w*)?Config", node.name)
    ]
    assert {node.name for node in classes} == {name for name in package.__all__ if name.endswith("Config")}
    for node in classes:
        assert dataclasses.is_dataclass(getattr(package, node.name))
        assert ast.get_docstring(node), node.name
        for field, following in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(field, ast.AnnAssign):
                continue
            annotation = ast.unparse(field.annotation)
            described = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            assert described or annotation.endswith("Config") or annotation in sections, ast.unparse(field)
