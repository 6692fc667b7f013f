"""Each config of deploy/configs as it stands: loader, one rank, two steps, the export; with a tiny model under its hub id.

Only sizes are changed on the command line. The models stand in a hub cache, laid out as `hf download` leaves it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("av", reason="NOT TESTED: LeRobot data sets need av; pip install 'stoker[lerobot]'")
pytest.importorskip("pyarrow", reason="NOT TESTED: LeRobot data sets need pyarrow; pip install 'stoker[lerobot]'")

from PIL import Image

from stoker_proto.config.reader import load_config
from tests.end_to_end.fleet import ROOT, serving
from tests.loader_service.sources.lerobot.files import write_lerobot
from tests.trainer.support.ranks import run_ranks
from trainer.build import build_trainer
from trainer.models.tiny import build_tiny

CONFIGS = ROOT / "deploy" / "configs"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_robot_data(folder: Path) -> None:
    shutil.copytree(ROOT / "tests" / "data" / "maniskill", folder / "maniskill")
    for split in ("train", "val"):
        shutil.move(folder / "maniskill" / f"{split}.jsonl", folder / "maniskill" / split / "demos.jsonl")
        inner = folder / "maniskill" / split / split
        inner.mkdir()
        for trajectory in (folder / "maniskill" / split).glob("*/"):
            if trajectory != inner:
                shutil.move(trajectory, inner)


def write_lerobot_data(folder: Path) -> None:
    write_lerobot(folder / "lerobot", (14, 15), version="v3.0", videos=["observation.images.front"])


def write_chats(folder: Path) -> None:
    """Dialogues of two turns; every other one is about an image."""
    (folder / "chat").mkdir(parents=True)
    generator = np.random.default_rng(0)
    rows = []
    for number in range(16):
        row = {"conversations": [{"from": "human", "value": f"<image> What is {number}?"},
                                 {"from": "gpt", "value": f"It is {number}."}]}  # fmt: skip
        Image.fromarray(generator.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / "chat" / f"{number}.png")
        rows.append({**row, "images": [f"{number}.png"]})
    (folder / "chat" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_talks(folder: Path) -> None:
    (folder / "chat").mkdir(parents=True)
    rows = [{"instruction": f"What is {n}?", "input": "", "output": f"It is {n}."} for n in range(60)]
    (folder / "chat" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_column(name: str, column: str, folder: Path) -> None:
    (folder / name).mkdir(parents=True)
    rows = [{column: f"def f_{n}(x):\n    return x + {n}\n"} for n in range(60)]
    (folder / name / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


CASES: dict[str, tuple[str, Callable[[Path], None], tuple[str, ...]]] = {
    "maniskill_sft_openpi": ("openvla", write_robot_data, ("data.action.codec=bins",)),
    "maniskill_qwen_vl": ("qwen2_5_vl", write_robot_data, ("data.action.codec=bins", "data.image.size=[64, 64]")),
    "maniskill_paligemma_lora": ("paligemma", write_robot_data, ("data.action.codec=bins",)),
    "maniskill_internvl": ("internvl", write_robot_data, ("data.action.codec=bins",)),
    "lerobot_smolvlm": ("smolvlm", write_lerobot_data, ("data.action.codec_options={vocab_size: 300}",)),
    "chat_llava": ("llava", write_chats, ()),
    "chat_llm": ("causal", write_talks, ("data.max_seq_len=128",)),
    "code_llm": ("causal", partial(write_column, "code", "content"), ("data.max_seq_len=128",)),
    "text_llm": ("causal", partial(write_column, "text", "text"), ("data.max_seq_len=128",)),
}
"""Config -> its model's family, what writes its data, and what its small data need."""
SIZES = ("model.precision=fp32", "trainer.micro_batch_size=2", "trainer.global_batch_size=4", "trainer.max_steps=2",
         "trainer.warmup_ratio=0", "trainer.output_dir=out", "cluster.component_placement={trainer: 0, dataloader: 0}",
         "loader.workers=1", "trainer.eval_interval=0")  # fmt: skip


def put_into_hub_cache(cache: Path, hub_id: str, family: str) -> None:
    folder = cache / f"models--{hub_id.replace('/', '--')}"
    build_tiny(family, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)


def train(folder: Path, config: Path, overrides: tuple[str, ...], rank: int) -> None:
    os.chdir(folder)
    trainer = build_trainer(load_config(config, overrides))
    try:
        trainer.run()
    finally:
        trainer.close()


QUICK = ("maniskill_sft_openpi", "chat_llm")
RUN_BY_PROGRAMS = {"demo", "success"}
"""`make demo` and `make success` run these."""


def test_every_shipped_config_has_a_case() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} - RUN_BY_PROGRAMS == set(CASES)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in CASES])
def test_a_shipped_config_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, write_data, more = CASES[name]
    path = CONFIGS / f"{name}.yaml"
    config = load_config(path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    put_into_hub_cache(tmp_path / "cache", config.model.base_model_path, family)
    write_data(tmp_path / "data")
    overrides = (*SIZES, *more)
    words = [word for override in overrides for word in ("--set", override)]
    with serving(path, *words, cwd=tmp_path) as loader:
        overrides += (f"cluster.loader_addresses=[{loader.address}]",)
        run_ranks(1, partial(train, tmp_path, path, overrides))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["samples"] == 8
    assert summary["bad_samples"] == 0
    assert np.isfinite(summary["train"]["loss"])
    assert (tmp_path / "out" / "export" / "model.safetensors").is_file()
    logs = tmp_path / (config.trainer.logger.log_dir or "out") / "tensorboard"
    assert len(list(logs.glob("events.*"))) == 1
