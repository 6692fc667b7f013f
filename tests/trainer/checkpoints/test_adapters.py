"""Runs with adapters, averages and several learning rates: resumed bit for bit, exported as they were trained."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stoker_proto.config import Config, LoraConfig, LossConfig, ParameterGroupConfig
from stoker_proto.errors import ConfigError
from tests.end_to_end.fleet import ROOT, environment
from tests.trainer.support.memory import make_config
from tests.trainer.support.ranks import run_ranks
from tests.trainer.support.runs import build_run, digests, run, weights
from trainer.checkpoints.command import main as export_command
from trainer.checkpoints.from_checkpoint import build_model
from trainer.checkpoints.weights import read_weights
from trainer.policy_loading import load_parts

CHECKPOINT = {"interval": 2, "keep": 10}
LORA = LoraConfig(rank=4, alpha=8)
KEYS: dict[str, Any] = {"max_steps": 4, "lr": 1e-2, "lr_schedule": "constant", "checkpoint": CHECKPOINT}
pytestmark = pytest.mark.process


def trained_logits(config: Config, rank: int, *, images: bool = True) -> Any:
    """Of the trained engine, for one micro-batch, with that micro-batch's arguments."""
    trainer = build_run(config, images=images)
    trainer.run()
    assert trainer.val is not None
    inputs = trainer.stepper.make_inputs(next(iter(trainer.val.feed.steps(0, 0))).micro_batches[0])
    trainer.stepper.engine.eval()
    with torch.no_grad():
        logits = trainer.stepper.engine(**inputs.arguments, use_cache=False).logits
    return {name: tensor.numpy() for name, tensor in inputs.arguments.items()}, logits.float().numpy()


@pytest.fixture(scope="module")
def merged(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("merged")
    config = make_config(tiny_llava, folder, lora=LORA, **KEYS)
    return folder, run_ranks(2, lambda rank: trained_logits(config, rank))[0]


def reload(folder: Path, given: Any) -> np.ndarray[Any, Any]:
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found: np.ndarray[Any, Any] = model(**{n: torch.from_numpy(a) for n, a in given.items()}).logits.numpy()
    return found


def test_a_merged_export_is_the_trained_model(merged: tuple[Path, Any], tiny_llava: Path) -> None:
    folder, (given, logits) = merged
    np.testing.assert_allclose(reload(folder / "export", given), logits, rtol=0, atol=1e-5)
    before, after = load_file(tiny_llava / "model.safetensors"), weights(folder / "export")
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 3 * 7
    assert all("language_model" in name and name.endswith("_proj.weight") for name in changed)


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft asks transformers by its old name
def test_an_adapter_export_is_the_trained_model(merged: tuple[Path, Any], tiny_llava: Path, tmp_path: Path) -> None:
    """Loaded by transformers and by peft onto the base model; the run itself was the same, so its logits are."""
    import peft
    import transformers

    _, (given, logits) = merged
    config = make_config(tiny_llava, tmp_path, lora=LoraConfig(rank=4, alpha=8, export="adapter"), **KEYS)
    run_ranks(2, lambda rank: run(config))
    export = tmp_path / "export"
    assert not (export / "model.safetensors").exists()
    assert (export / "adapter_model.safetensors").stat().st_size < (
        tiny_llava / "model.safetensors"
    ).stat().st_size / 10
    np.testing.assert_allclose(reload(export, given), logits, rtol=0, atol=1e-5)
    base = transformers.AutoModelForImageTextToText.from_pretrained(tiny_llava, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(export))
    with torch.no_grad():
        found = model(**{n: torch.from_numpy(a) for n, a in given.items()}).logits.numpy()
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft, as above
@pytest.mark.filterwarnings("ignore:.*tied layer is part of the adapter:UserWarning")
@pytest.mark.parametrize(
    ("kind", "num_ranks"),
    [("own", 1), pytest.param("own", 2, marks=pytest.mark.slow), pytest.param("tied", 2, marks=pytest.mark.slow)],
)
def test_adapters_on_the_head_alone_are_trained_and_exported(
    kind: str, num_ranks: int, tiny_causal: Path, tied_causal: Path, tmp_path: Path
) -> None:
    """Under ZeRO-3 as under ZeRO-1, with the loss in chunks, though no hidden state has a gradient. And beside a tied head."""
    import peft
    import transformers

    base = tiny_causal if kind == "own" else tied_causal
    lora = LoraConfig(rank=4, alpha=8, targets=("lm_head",), export="merged" if kind == "own" else "adapter")
    found, losses = {}, {}
    for stage in (3, 1):
        loss, folder = LossConfig(chunk_labels=7), tmp_path / str(stage)
        config = make_config(base, folder, lora=lora, zero_stage=stage, loss=loss, **KEYS)
        found[stage] = run_ranks(num_ranks, partial(trained_logits, config, images=False))[0]
        losses[stage] = [line["loss"] for line in digests(folder)]
    assert losses[3] == pytest.approx(losses[1], abs=1e-5)
    assert losses[3][-1] < losses[3][0] - 0.1
    given, logits = found[3]
    np.testing.assert_allclose(logits, found[1][1], rtol=0, atol=1e-4)
    tensors = {name: torch.from_numpy(array) for name, array in given.items()}
    if kind == "own":
        before, after = load_file(base / "model.safetensors"), weights(tmp_path / "3" / "export")
        assert {name for name in before if not torch.equal(before[name], after[name])} == {"lm_head.weight"}
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "3" / "export", dtype=torch.float32)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(model, str(tmp_path / "3" / "export"))
    policy, _, _ = load_parts(tmp_path / "3" / "checkpoints" / "step-00000004", torch.float32)
    with torch.no_grad():
        for one in (model, policy):
            np.testing.assert_allclose(one(**tensors).logits.numpy(), logits, rtol=0, atol=1e-5)


def resumed(folder: Path, make: Callable[[Path], Config], straight: Path) -> None:
    """Kill after three of four steps, resume from the second: all digits of losses and weights are the straight run's."""
    config = make(folder)
    run_ranks(2, lambda rank: run(config, fail_at=(0, 24)))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    run_ranks(2, lambda rank: run(config))
    expected, found = digests(straight), digests(folder)
    assert found == expected[:3] + expected[2:]
    ours, theirs = weights(folder / "export"), weights(straight / "export")
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.slow
def test_a_resume_of_adapters_is_exact_and_their_checkpoint_small(
    merged: tuple[Path, Any], tiny_llava: Path, tmp_path: Path
) -> None:
    resumed(tmp_path, lambda folder: make_config(tiny_llava, folder, lora=LORA, **KEYS), merged[0])
    size = sum(file.stat().st_size for file in (tmp_path / "checkpoints" / "step-00000002" / "deepspeed").iterdir())
    assert size < (tiny_llava / "model.safetensors").stat().st_size / 2, "without the base model's weights"


def test_adapters_of_another_base_model_are_refused(merged: tuple[Path, Any], tiny_llava: Path, tmp_path: Path) -> None:
    base = tmp_path / "model"
    shutil.copytree(tiny_llava, base)
    content = bytearray((base / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (base / "model.safetensors").write_bytes(content)
    shutil.copytree(merged[0] / "checkpoints" / "step-00000002", tmp_path / "checkpoints" / "step-00000002")

    def refused(rank: int) -> str:
        with pytest.raises(ConfigError) as caught:
            build_run(make_config(base, tmp_path, lora=LORA, **KEYS))
        return str(caught.value)

    assert "made with base_weights" in run_ranks(1, refused)[0]


OWN_RATES = {
    "parameter_groups": (ParameterGroupConfig(match=("*multi_modal_projector*",), lr=1e-3, weight_decay=0.0),),
    "ema_decay": 0.5, "freeze": ("*vision_tower*",), "optimizer": "adamw_fused", "weight_decay": 0.1,
}  # fmt: skip


@pytest.mark.slow
def test_averages_groups_and_frozen_weights_resume_exactly(tiny_llava: Path, tmp_path: Path) -> None:
    straight = tmp_path / "straight"
    config = make_config(tiny_llava, straight, **KEYS, **OWN_RATES)
    run_ranks(2, lambda rank: run(config))
    before, after = load_file(tiny_llava / "model.safetensors"), weights(straight / "export")
    assert {name for name in before if torch.equal(before[name], after[name])} == {
        n for n in before if "vision_tower" in n
    }
    resumed(tmp_path / "killed", lambda folder: make_config(tiny_llava, folder, **KEYS, **OWN_RATES), straight)


RESIZED: dict[str, dict[str, Any]] = {
    "adapters": {"lora": LORA},
    "averages": OWN_RATES,
    "both": {"lora": LORA, "ema_decay": 0.5},
}


def resume(config: Config) -> dict[str, np.ndarray[Any, Any]]:
    """Run to the end. Returns what the run began with, by name: the trained weights and their averages; on the first rank."""
    from trainer.checkpoints.export import gather_average, gather_weights

    trainer = build_run(config)
    engine = trainer.stepper.engine
    trained = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    found = {name: tensor for name, tensor in gather_weights(engine).items() if name in trained}
    found |= {f"average of {name}": tensor for name, tensor in gather_average(engine, trainer.ranks).items()}
    begun = {name: tensor.detach().float().numpy().copy() for name, tensor in found.items()}
    trainer.run()
    return begun


def saved(step: Path, keys: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """The same, as DeepSpeed's own reader finds it in the checkpoint."""
    found = read_weights(step, adapters_only="lora" in keys)
    if "ema_decay" in keys:
        averages = read_weights(step, adapters_only="lora" in keys, averages=True)
        found |= {f"average of {name}": tensor for name, tensor in averages.items()}
    return {name: tensor.detach().numpy() for name, tensor in found.items()}


def in_bf16(value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    rounded: np.ndarray[Any, Any] = torch.from_numpy(value).to(torch.bfloat16).float().numpy()
    return rounded


def rows_of_steps(folder: Path, world_size: int) -> dict[int, list[str]]:
    """Step -> digests of its rows, micro-batch by micro-batch in global order."""
    ranks = [{line["step"]: line["rows"] for line in digests(folder, rank)} for rank in range(world_size)]
    return {
        step: [rows for turn in zip(*(rank[step] for rank in ranks), strict=True) for rows in turn] for step in ranks[0]
    }


@pytest.mark.slow  # each case starts ranks twice
@pytest.mark.parametrize(
    ("kind", "before", "after", "stage", "precision"),
    [
        ("adapters", 2, 1, 3, "fp32"), ("averages", 2, 1, 2, "fp32"), ("averages", 1, 2, 3, "fp32"),
        ("both", 2, 1, 2, "fp32"), ("both", 1, 2, 3, "fp32"), ("adapters", 1, 2, 1, "fp32"), ("averages", 2, 1, 1, "fp32"),
        ("averages", 2, 1, 1, "bf16"), ("both", 1, 2, 1, "bf16"),
    ],
)  # fmt: skip
def test_adapters_and_averages_resume_on_another_number_of_ranks(
    kind: str, before: int, after: int, stage: int, precision: str, tiny_llava: Path, tmp_path: Path
) -> None:
    """The run begins with what was saved, and trains and exports as the one that was not disturbed.

    ZeRO-1 in bf16 is another optimizer of DeepSpeed's. bf16 rounds a sum in another order to a neighbour now and then.
    """
    keys = {**KEYS, **RESIZED[kind], "zero_stage": stage, "precision": precision}
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    run_ranks(before, lambda rank: run(make_config(tiny_llava, straight, **keys)))
    step = moved / "checkpoints" / "step-00000002"
    shutil.copytree(straight / "checkpoints" / step.name, step)
    config = make_config(tiny_llava, moved, **{**keys, "checkpoint": {**CHECKPOINT, "universal": True}})
    begun, expected = run_ranks(after, lambda rank: resume(config))[0], saved(step, keys)
    if precision == "bf16":
        expected |= {name: in_bf16(value) for name, value in expected.items() if not name.startswith("average of")}
    assert any(name.startswith("average of") for name in begun) == ("ema_decay" in keys)
    assert [name for name, value in begun.items() if not np.array_equal(value, expected[name])] == []
    rows = rows_of_steps(straight, before)
    assert rows_of_steps(moved, after) == {step: rows[step] for step in (3, 4)}
    assert len(rows[3]) == 4
    lines, others = digests(moved), digests(straight)[2:]
    assert [line["step"] for line in lines] == [line["step"] for line in others] == [3, 4]
    close = {"fp32": 1e-5, "bf16": 2e-3}[precision]
    assert lines[0]["loss"] == pytest.approx(others[0]["loss"], abs=1e-5)
    assert lines[1]["loss"] == pytest.approx(others[1]["loss"], abs=close)
    ours, theirs = (saved(folder / "checkpoints" / "step-00000004", keys) for folder in (moved, straight))
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=close, err_msg=name)
    if precision == "fp32":
        exported, expected_export = weights(moved / "export"), weights(straight / "export")
        for name, tensor in expected_export.items():
            np.testing.assert_allclose(exported[name].numpy(), tensor.numpy(), rtol=0, atol=1e-5, err_msg=name)


def average_by_hand(config: Config, rank: int) -> Any:
    """The average of what the weights were after each step, and the export of the same run."""
    from trainer.checkpoints.export import gather_weights

    trainer = build_run(config, images=False)
    engine, begin = trainer.stepper.engine, trainer.stepper.begin
    seen = [{name: tensor.clone() for name, tensor in gather_weights(engine).items()}]

    def recorded(*arguments: Any) -> Any:
        step = begin(*arguments)
        seen.append({name: tensor.clone() for name, tensor in gather_weights(engine).items()})
        return step

    trainer.stepper.begin = recorded  # type: ignore[method-assign]
    trainer.run()
    average = seen[0]
    for weights_now in seen[1:]:
        average = {name: 0.75 * average[name] + 0.25 * tensor for name, tensor in weights_now.items()}
    return {name: tensor.numpy() for name, tensor in average.items()}, len(seen)


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_export_holds_the_average_of_the_weights(
    tied_causal: Path, tmp_path: Path, stage: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a model whose embeddings are tied: the head has the average, too, and stands in the file once, as in the base's."""
    config = make_config(tied_causal, tmp_path, ema_decay=0.75, zero_stage=stage, **KEYS)
    expected, count = run_ranks(2, lambda rank: average_by_hand(config, rank))[0]
    assert count == 5
    found = weights(tmp_path / "export")
    for name, value in expected.items():
        if name in found:
            np.testing.assert_allclose(found[name].numpy(), value, rtol=0, atol=1e-6, err_msg=name)
    assert set(found) == set(weights(tied_causal)) == set(expected) - {"lm_head.weight"}
    assert (
        export_command(
            ["--checkpoint", str(tmp_path / "checkpoints" / "step-00000004"), "--out", str(tmp_path / "own")]
        )
        == 0
    )
    used = str(tmp_path / "checkpoints" / "step-00000004")
    assert export_command(["--checkpoint", used, "--out", str(tmp_path)]) == 1, "the run's own folder"
    error = capsys.readouterr().err
    assert f"error: --out is {str(tmp_path)!r}, which is there and no export" in error
    assert (tmp_path / "checkpoints" / "step-00000004" / "stoker.json").is_file()
    again = weights(tmp_path / "own")
    assert again.keys() == found.keys()
    assert [name for name in found if not torch.equal(again[name], found[name])] == []


def reduced_in(config: Config, rank: int) -> Any:
    """The number formats that the ranks add gradients up in: seen in the collectives."""
    import deepspeed.comm as comm

    trainer, seen = build_run(config, images=False), set()
    originals = {name: getattr(comm, name) for name in ("reduce_scatter_fn", "all_reduce", "reduce")}

    def watch(name: str) -> Any:
        def call(*arguments: Any, **keys: Any) -> Any:
            tensors = [a for a in arguments if torch.is_tensor(a)]
            seen.update(str(tensor.dtype) for tensor in tensors if tensor.numel() > 64)
            return originals[name](*arguments, **keys)

        return call

    for name in originals:
        setattr(comm, name, watch(name))
    trainer.run()
    return sorted(seen)


@pytest.mark.parametrize(
    ("reduce_dtype", "expected"),
    [pytest.param("fp32", "torch.float32", marks=pytest.mark.slow), ("bf16", "torch.bfloat16")],
)
def test_gradients_are_added_up_in_the_format_of_the_config(
    reduce_dtype: str, expected: str, tiny_causal: Path, tmp_path: Path
) -> None:
    keys = {**KEYS, "max_steps": 1}
    config = make_config(tiny_causal, tmp_path, precision="bf16", reduce_dtype=reduce_dtype, export=False, **keys)
    assert run_ranks(2, lambda rank: reduced_in(config, rank)) == [[expected], [expected]]


@pytest.mark.parametrize(
    "kind", [pytest.param("whole", marks=pytest.mark.slow), pytest.param("adapters", marks=pytest.mark.slow)]
)
def test_the_export_of_a_checkpoint_is_that_of_its_run(
    kind: str, merged: tuple[Path, Any], tiny_llava: Path, tmp_path: Path
) -> None:
    """By the command, from the last checkpoint: bit by bit the weights that the run itself exported, in bf16 and fp32."""
    folder = merged[0]
    if kind == "whole":
        folder = tmp_path / "run"
        keys = {**KEYS, "max_steps": 2, "zero_stage": 2, "precision": "bf16", "freeze": ("*vision_tower*",)}
        config = make_config(tiny_llava, folder, **keys)
        run_ranks(2, lambda rank: run(config))
    step = sorted((folder / "checkpoints").iterdir())[-1]
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "trainer.checkpoints.command", "--checkpoint", str(step), "--out", str(out)],
        capture_output=True, text=True, check=False, timeout=500, cwd=ROOT, env=environment(),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    expected, found = weights(folder / "export"), weights(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert {file.name for file in out.iterdir()} == {file.name for file in (folder / "export").iterdir()}


def test_a_host_without_a_gpu_exports_what_was_trained_with_flash_attention(tiny_causal: Path, tmp_path: Path) -> None:
    model = build_model(make_config(tiny_causal, tmp_path, attention="flash", precision="bf16"), 0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export_command(["--checkpoint", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/stoker.json: not the state of a checkpoint")
