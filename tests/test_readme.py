"""The README's promises that can be checked without running its commands (those are run by other tests and by `make demo`)."""

from __future__ import annotations

import re
from pathlib import Path

from loader_service.sources.base import SOURCES as SOURCES_OF_CODE
from loader_service.sources.base import make_datasets
from stoker_proto.config.reader import load_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SOURCES = (ROOT / "loader_service" / "sources" / "README.md").read_text()


def test_linked_files_exist() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)", README) if "://" not in target]
    assert len(targets) > 8
    assert not [target for target in targets if not (ROOT / target).exists()]


def test_the_example_configuration_is_one(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", README, re.S)
    path = tmp_path / "my.yaml"
    path.write_text(example)
    config = load_config(path)
    assert config.cluster.component_placement.trainer == (0, 1, 2, 3)
    assert config.trainer.lr == 2e-5


def test_every_make_target_named_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"demo", "test", "bench"} <= named
    assert named <= targets


def test_every_file_named_in_a_command_is_there() -> None:
    commands = " ".join(re.findall(r"```sh\n(.*?)```", README, re.S))
    files = re.findall(r"\b((?:deploy|trainer|tests|loader_service)/[\w/.-]+\.(?:py|sh|yaml))", commands)
    assert files
    assert not [file for file in files if not (ROOT / file).exists()]


def test_the_examples_of_sources_are_configurations(tmp_path: Path) -> None:
    examples = re.findall(r"```yaml\n(.*?)```", SOURCES, re.S)
    assert len(examples) >= 5
    for example in examples:
        (tmp_path / "my.yaml").write_text(
            f"model: {{base_model_path: m}}\n{example}trainer: {{micro_batch_size: 1, global_batch_size: 1, lr: 1e-5}}\n"
        )
        make_datasets(load_config(tmp_path / "my.yaml").data)  # their options too


def test_every_dataset_type_is_told_of() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", SOURCES.split("\n## ")[0], re.M)) - {"dataset_type"} == set(
        SOURCES_OF_CODE
    )


def test_the_config_names_every_dataset_type() -> None:
    text = (
        (ROOT / "proto" / "stoker_proto" / "config" / "data.py")
        .read_text()
        .split("class DataConfig:")[1]
        .split("dataset_type: str")[1]
        .split('"""')[1]
    )
    assert set(re.findall(r"`(\w+)`", text)) == set(SOURCES_OF_CODE)


def test_the_readme_says_how_the_commands_are_installed() -> None:
    command = "pip install -c deploy/constraints.txt -e '.[train]'"
    assert command in README.split("## Point it at your data")[1].split("loader-prepare --config")[0]
    assert command in (ROOT / "deploy" / "README.md").read_text()


def test_every_test_that_a_support_table_names_exists() -> None:
    """A name without a folder lies beside the name before it, as in `tests/a/test_b.py`, `test_c.py`."""
    named = []
    for row in re.findall(r"^\|.*\|$", README, re.M):
        folder = ROOT
        for name in re.findall(r"`([\w/]+\.py)`", row.split("|")[-2]):
            folder = (ROOT / name).parent if "/" in name else folder
            named.append(folder / Path(name).name)
    assert len(named) >= 15
    assert [str(path) for path in named if not path.is_file()] == []
