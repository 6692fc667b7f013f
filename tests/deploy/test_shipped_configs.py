"""The configs that come with the repository are read as they stand, and the constraints pin what they need."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from stoker_proto.config.reader import load_config

ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted((ROOT / "deploy" / "configs").glob("*.yaml"))
CONSTRAINTS = ROOT / "deploy" / "constraints.txt"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_it_is_read(path: Path) -> None:
    assert load_config(path).data.train_data_paths


def test_the_page_s_keys_are_kept_word_for_word() -> None:
    path = ROOT / "deploy" / "configs" / "maniskill_sft_openpi.yaml"
    tree = yaml.safe_load(path.read_text())
    assert {section: set(keys) for section, keys in tree.items()} == {
        "cluster": {"num_nodes", "component_placement"},
        "model": {"base_model_path", "gradient_checkpointing"},
        "data": {"dataset_type", "train_data_paths", "val_data_paths", "max_seq_len"},
        "trainer": {
            *("micro_batch_size", "global_batch_size", "lr", "epochs", "eval_interval", "logger"),
        },
    }
    config = load_config(path)
    assert config.cluster.component_placement.trainer == (0, 1, 2, 3)
    assert config.cluster.component_placement.dataloader == (4, 5, 6, 7)
    assert config.model.base_model_path == "gen-robot/openvla-7b-rlvla-warmup"
    assert config.model.gradient_checkpointing is True
    assert (config.data.dataset_type, config.data.max_seq_len) == ("mani_openpi", 2048)
    assert (config.trainer.micro_batch_size, config.trainer.global_batch_size) == (4, 1024)
    assert (config.trainer.lr, config.trainer.epochs) == (2e-5, 3)
    assert config.trainer.logger.log_dir == "./logs"
    assert config.trainer.logger.wandb is False


def test_the_demo_s_data_are_in_the_repository() -> None:
    config = load_config(ROOT / "deploy" / "configs" / "demo.yaml")
    for path in (*config.data.train_data_paths, *config.data.val_data_paths):
        assert (ROOT / path).is_file()


def test_every_constraint_is_an_exact_version_and_no_address() -> None:
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[a-z0-9_.-]+==[0-9][0-9a-z.]*", line), line
    assert len(lines) == len({line.partition("==")[0].replace("_", "-") for line in lines})


def test_all_that_is_required_directly_is_constrained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pinned = {
        line.partition("==")[0].replace("_", "-") for line in CONSTRAINTS.read_text().splitlines() if line[0] != "#"
    }
    of_tests = [requirement for name in extras if name not in ("sim", "wandb") for requirement in extras[name]]
    for requirement in (*project["dependencies"], *of_tests):
        name = re.split(r"[^\w-]", requirement)[0].lower()
        assert name in pinned or name == project["name"], f"{name} is not in deploy/constraints.txt"
