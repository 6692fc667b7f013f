"""`trainer.zero_stage: auto`: 1 where it fits, 3 where it does not, the checkpoint's on a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stoker_proto.config import LoraConfig
from stoker_proto.errors import ConfigError
from tests.trainer.support.memory import make_config
from trainer.engine import zero_stage
from trainer.engine.ranks import Ranks
from trainer.engine.zero_stage import bytes_needed, count_weights, with_zero_stage

ONE = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def test_what_stage_1_takes() -> None:
    assert bytes_needed(10, "bf16", 1) == 180
    assert bytes_needed(10, "bf16", 4) == 90
    assert bytes_needed(10, "fp32", 2) == 120


def test_the_stage_follows_the_memory_and_the_checkpoint(
    tiny_causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero_stage, "max_over_ranks", lambda values, ranks: list(values))
    config = make_config(tiny_causal, tmp_path, zero_stage="auto")
    number = count_weights(tiny_causal)
    assert number == sum(tensor.numel() for tensor in _weights(tiny_causal))

    def stage(free: float, of_checkpoint: int | None = None) -> object:
        monkeypatch.setattr(zero_stage, "_free_bytes", lambda device: free)
        return with_zero_stage(config, ONE, of_checkpoint).trainer.zero_stage

    assert (stage(number * 32), stage(number * 32 - 1)) == (1, 3)  # half of it holds 16 bytes a parameter
    assert stage(number * 32, of_checkpoint=3) == 3
    config = make_config(tiny_causal, tmp_path, zero_stage="auto", lora=LoraConfig(rank=2))
    adapters = 2 * sum(sum(tensor.shape) for tensor in _weights(tiny_causal) if tensor.dim() == 2)
    most = 2 * (4 * number + 16 * adapters)  # the base model has weights only
    assert most < number * 20
    assert (stage(most), stage(most - 1)) == (1, 3)
    fixed = make_config(tiny_causal, tmp_path, zero_stage=2)
    assert with_zero_stage(fixed, ONE, 3) is fixed


def _weights(folder: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return list(load_file(folder / "model.safetensors").values())


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there are no \*\.safetensors, .*: set 1, 2 or 3"):
        count_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ConfigError, match="not a safetensors file"):
        count_weights(tmp_path)
