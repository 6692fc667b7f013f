"""`--plan` as a user meets it: a table and JSON, for the real shape of a 7B model without its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stoker_proto.config import LossConfig
from tests.trainer.support.memory import make_config
from trainer import main
from trainer.plan import activations
from trainer.plan.report import Known, make_plan
from trainer.plan.shape import empty_model

CONFIG = """
cluster: {{component_placement: {{trainer: 0-1, dataloader: 0}}}}
model: {{base_model_path: {model}}}
data: {{dataset_type: text, train_data_paths: [none.jsonl], max_seq_len: 64}}
trainer: {{micro_batch_size: 2, global_batch_size: 8, lr: 2e-5, epochs: 3, output_dir: {output}}}
"""


@pytest.fixture
def config_file(tiny_causal: Path, tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG.format(model=tiny_causal, output=tmp_path / "out"))
    return file


@pytest.mark.long
def test_the_table_and_the_same_as_json(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--config", str(config_file), "--plan", "--samples", "100", "--samples-per-second", "500"]
    options += ["--loader-samples-per-second", "200"]
    assert main.main(options) == 0
    text = capsys.readouterr().out
    assert "run: 100 samples an epoch, 3 epochs: 39 steps, at most 19,200 tokens\n" in text
    assert (
        "500 samples/s need 3 loaders of 200 samples/s, one more if one may fail; the config has 1: TOO FEW\n" in text
    )
    [this] = [line.split() for line in text.splitlines() if line.startswith("* all")]
    assert this[2:4] == ["2", "3"]

    assert main.main([*options, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    rows = {(row["trains"], row["ranks"], row["stage"]): row for row in plan["memory"]}
    kinds = {trains for trains, _, _ in rows}
    assert set(rows) == {(t, n, s) for t in kinds for n in (1, 2, 4, 8) for s in (0, 1, 2, 3)}
    assert kinds == {"all", "LoRA rank 16"}
    assert f"{rows['all', 2, 3]['total'] / 1e6:.2f}" == this[-2]
    assert rows["LoRA rank 16", 4, 2]["optimizer"] < rows["all", 4, 2]["optimizer"] / 5
    assert plan["loaders"] == {
        "samples_per_second": 500.0, "planned": 1, "loader_samples_per_second": 200.0, "needed": 3,
    }  # fmt: skip


@pytest.mark.long
def test_too_little_disk_is_said(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = type("usage", (), {"free": 10_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    no_loader_runs = ["--set", "trainer.feed.connect_deadline_s=0.3"]
    assert main.main(["--config", str(config_file), "--plan", *no_loader_runs]) == 0
    text = capsys.readouterr().out
    assert "of the 10.0 MB that are free: TOO LITTLE\n" in text
    assert "run: steps are not known: pass --samples" in text


def test_a_number_below_one_is_refused(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--config", str(config_file), "--plan", "--samples", "0"]) == 1
    assert "error: --samples is 0: it must be above 0" in capsys.readouterr().err


@pytest.mark.long
def test_seven_billion_parameters_need_no_weights(tmp_path: Path) -> None:
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 32000, **shape}))
    config = make_config(tmp_path, tmp_path, precision="bf16", gradient_checkpointing=True)
    plan = make_plan(config, Known())
    assert plan["model"]["parameters"] == 6_738_415_616
    assert plan["memory"][0]["activations"] > 32 * 2 * 96 * 4096 * 2


@pytest.mark.long
@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        (LossConfig(chunk_labels=64), 64),
        (LossConfig(chunk_labels=1024), 2 * 96),
        (LossConfig(chunk_labels=0), 2 * 96),
        (LossConfig(chunk_labels=64, type="my:Loss"), 2 * 96),
    ],
)
def test_the_logits_of_a_chunk_are_planned_for(
    loss: LossConfig, labels: int, tiny_causal: Path, tmp_path: Path
) -> None:
    """Two rows of 96 labels; bf16 logits, their float32 copy, the softmax, and two gradients: 16 bytes each."""
    config = make_config(tiny_causal, tmp_path, precision="bf16", loss=loss)
    vocabulary = AutoConfig.from_pretrained(tiny_causal).vocab_size
    assert make_plan(config, Known())["memory"][0]["logits"] == labels * vocabulary * 16


@pytest.mark.long
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_activations_are_what_a_real_forward_keeps(
    attention: str, tiny_causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same model with numbers in it. PyTorch's kernel for CPUs keeps what is counted for those of GPUs."""
    config = make_config(tiny_causal, tmp_path, precision="fp32", attention=attention)
    model_config = AutoConfig.from_pretrained(tiny_causal)
    planned = activations.activation_bytes(
        empty_model(config, model_config), 2, 32, checkpointing=False, eager=attention == "eager"
    )
    real = AutoModelForCausalLM.from_config(model_config, attn_implementation=attention)
    kept: dict[int, torch.Tensor] = {}
    own = {parameter.data_ptr() for parameter in real.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    embeddings = torch.randn(2, 32, model_config.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        real.model(inputs_embeds=embeddings, use_cache=False)
    assert planned == pytest.approx(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), rel=0.02)
