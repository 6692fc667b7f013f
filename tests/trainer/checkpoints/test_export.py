"""What is exported is what was trained: loaded by the Auto classes in a fresh process, it gives the same logits."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stoker_proto.config import ActionConfig, Config, ImageConfig
from stoker_proto.processor import Processor
from tests.trainer.support.memory import make_config, make_examples, make_piece, make_processor
from tests.trainer.support.ranks import run_ranks
from tests.trainer.support.runs import build_run
from trainer.checkpoints.card import TrainingFacts, model_card
from trainer.checkpoints.export import in_format
from trainer.feed.batch import BatchBuilder
from trainer.policy import Policy
from trainer.training.inputs import InputMaker

pytestmark = pytest.mark.process

FRESH = """
import json, sys, torch, transformers
from safetensors.torch import load_file
answers = {}
for name, folder, kind in json.loads(sys.argv[1]):
    model = getattr(transformers, kind).from_pretrained(folder)   # as the README has it: no flags
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if kind != "AutoModelForCausalLM":
        transformers.AutoProcessor.from_pretrained(folder)
    given = load_file(f"{folder}/../inputs.safetensors")
    expected = given.pop("logits")
    with torch.no_grad():
        logits = model(**given).logits
    prompt = tokenizer("<|User|> say 1 <|Assistant|>", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
    answers[name] = {
        "difference": (logits.float() - expected).abs().max().item(), "largest": expected.abs().max().item(),
        "dtype": str(model.dtype), "text": text, "tokens": len(tokenizer),
        "action": tokenizer.convert_tokens_to_ids("<action_3>"),
    }
print(json.dumps(answers))
"""


@dataclass(frozen=True)
class Case:
    """One run that exports."""

    config: Config
    kind: str
    images: bool = True


def train_and_export(case: Case, rank: int) -> None:
    """Two steps, the export, and the trained engine's logits of one micro-batch beside it."""
    from safetensors.torch import save_file

    trainer = build_run(case.config, images=case.images)
    trainer.run()
    batch = next(iter(trainer.val.feed.steps(0, 0))).micro_batches[0] if trainer.val is not None else None
    assert batch is not None
    inputs = trainer.stepper.make_inputs(batch)
    trainer.stepper.engine.eval()
    with torch.no_grad():
        logits = trainer.stepper.engine(**inputs.arguments, use_cache=False).logits.float()
    if rank == 0:
        tensors = {**inputs.arguments, "logits": logits}
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            Path(case.config.trainer.output_dir) / "inputs.safetensors",
        )


@pytest.fixture(scope="module")
def cases(
    request: pytest.FixtureRequest,
    tiny_llava: Path,
    tiny_idefics3: Path,
    tied_causal: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Case]:
    """Those that the chosen tests need are trained."""
    action = ActionConfig(codec="bins", vocabulary="added", codec_options={"num_bins": 128})
    added = {"action": action, "image": ImageConfig(transport="base64")}
    folders = {name: tmp_path_factory.mktemp(name) for name in ("llava", "idefics3", "causal", "causal2")}
    image_text, causal = "AutoModelForImageTextToText", "AutoModelForCausalLM"
    keys: dict[str, Any] = {"max_steps": 2, "lr": 1e-2, "lr_schedule": "constant"}
    found = {
        "llava": Case(make_config(tiny_llava, folders["llava"], data=added, **keys), image_text),
        "idefics3": Case(make_config(tiny_idefics3, folders["idefics3"], precision="bf16", **keys), image_text),
        "causal": Case(make_config(tied_causal, folders["causal"], data=added, **keys), causal, images=False),
        "causal2": Case(make_config(tied_causal, folders["causal2"], zero_stage=2, **keys), causal, images=False),
    }
    wanted = {"llava"} | {
        str(item.callspec.params.get("name"))
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    }
    found = {name: case for name, case in found.items() if name in wanted}
    for case in found.values():
        run_ranks(2, partial(train_and_export, case))
    return found


@pytest.fixture(scope="module")
def answers(cases: dict[str, Case]) -> dict[str, Any]:
    """Of one fresh process that knows nothing of Stoker."""
    work = [(name, f"{case.config.trainer.output_dir}/export", case.kind) for name, case in cases.items()]
    done = subprocess.run(
        [sys.executable, "-c", FRESH, json.dumps(work)], capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llava", "float32"),
        pytest.param("idefics3", "bfloat16", marks=pytest.mark.slow),
        ("causal", "float32"),
        pytest.param("causal2", "float32", marks=pytest.mark.slow),
    ],
)
def test_a_fresh_process_gets_the_trained_logits(name: str, dtype: str, answers: dict[str, Any]) -> None:
    answer = answers[name]
    assert answer["dtype"] == f"torch.{dtype}"
    tolerance = 1e-5 if dtype == "float32" else 2**-7 * answer["largest"]
    assert answer["difference"] <= tolerance
    assert answer["text"].startswith(("<s><|User|>", "<|User|>"))


def test_added_action_tokens_have_the_ids_that_were_trained(cases: dict[str, Case], answers: dict[str, Any]) -> None:
    processor = make_processor(cases["llava"].config)
    assert processor.vocabulary is not None
    assert answers["llava"]["action"] == processor.vocabulary.to_ids([3])[0]
    assert answers["llava"]["tokens"] == processor.vocab_size_needed
    exported = Processor.load(Path(cases["llava"].config.trainer.output_dir) / "export")
    assert exported.to_json() == processor.with_num_images((1, 1)).to_json()


def python_block(card: str) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return str(block)


@pytest.mark.parametrize(
    "name", [pytest.param("llava", marks=pytest.mark.slow), pytest.param("idefics3", marks=pytest.mark.slow), "causal"]
)
def test_the_lines_of_the_model_card_load_the_export(name: str, cases: dict[str, Case]) -> None:
    """In a fresh process that cannot import Stoker, in the export's folder."""
    case = cases[name]
    folder = Path(case.config.trainer.output_dir) / "export"
    block = python_block((folder / "README.md").read_text())
    assert case.kind in block
    assert ("AutoProcessor" in block) == case.images
    check = "\nimport sys; assert not [m for m in sys.modules if m.startswith('trainer')]\nprint(type(model).__name__)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", block + check],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    expected = {"llava": "LlavaForConditionalGeneration", "idefics3": "Idefics3ForConditionalGeneration"}
    assert done.stdout.split() == [expected.get(name, "LlamaForCausalLM")]


def test_the_model_card_says_what_was_trained(cases: dict[str, Case]) -> None:
    config = cases["llava"].config
    card = (Path(config.trainer.output_dir) / "export" / "README.md").read_text()
    summary = json.loads((Path(config.trainer.output_dir) / "summary.json").read_text())
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: robotics\ntags: [stoker]\n---\n")
    assert "| mani_openpi | `mani_openpi` | `memory` |  |" in card
    assert "2 steps of 8 rows, 16 samples in all. AdamW, peak learning rate 0.01 (constant)" in card
    assert "Codec `bins`: chunks of 1 actions of 3 numbers, as the ids" in card
    assert f"| train/loss | {summary['train']['loss']:.6g} |" in card
    assert "hf upload YOUR_NAME/YOUR_MODEL ." in card


def test_the_model_card_of_a_folder_names_no_model_of_the_hub(
    tiny_causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path of two folders looks like a hub id. And it says whose scores it has, where averages are exported."""
    monkeypatch.chdir(tiny_causal.parent.parent)
    config = make_config(Path(*tiny_causal.parts[-2:]), tmp_path, ema_decay=0.99)
    facts = TrainingFacts(steps=1, samples=8, scores={"val/perplexity": 3.0})
    card = model_card(config, make_processor(config), facts, kind="llama", sees_images=False)
    assert "base_model:" not in card
    assert "Base model" not in card
    assert (
        "the exponential average of the trained ones, with decay 0.99; the scores are those of the trained ones."
        in card
    )


@pytest.mark.parametrize("name", ["llava", "causal"])
def test_another_user_may_read_all_that_is_exported(name: str, cases: dict[str, Case]) -> None:
    folder = Path(cases[name].config.trainer.output_dir) / "export"
    modes = {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()}
    assert "model.safetensors" in modes
    (folder.parent / "ordinary").write_text("")
    assert set(modes.values()) == {(folder.parent / "ordinary").stat().st_mode & 0o777}


@pytest.mark.parametrize("name", ["llava", pytest.param("idefics3", marks=pytest.mark.slow)])
def test_the_policy_does_what_teacher_forcing_predicts(name: str, cases: dict[str, Case]) -> None:
    policy = Policy.load(Path(cases[name].config.trainer.output_dir) / "export", dtype=torch.float32)
    assert policy.processor.vocabulary is not None
    vocabulary = policy.processor.vocabulary
    make_inputs = InputMaker(policy.processor, policy.family, torch.device("cpu"), torch.float32)
    build = BatchBuilder(decoder=policy.processor, num_rows=1, max_tokens=96)
    for example in make_examples(3, seed=5)[:2]:
        assert example.frame is not None
        ids = policy.action_ids(example.frame, example.instruction)
        actions = policy.act(example.frame, example.instruction)
        np.testing.assert_array_equal(actions, policy.processor.actions_from_ids(ids))
        # the row that a loader would send for this very action, through the path of training
        piece = make_piece(
            [type(example)(instruction=example.instruction, frame=example.frame, action=actions)], [0], policy.processor
        )
        inputs = make_inputs(build([piece]))
        with torch.no_grad():
            logits = policy.model(**inputs.arguments, logits_to_keep=inputs.positions).logits[0]
        forced = logits[: len(ids), vocabulary.first_id : vocabulary.end_id].argmax(-1) + vocabulary.first_id
        assert inputs.targets[0, : len(ids)].tolist() == ids.tolist()
        assert forced.tolist() == ids.tolist()


def test_tied_weights_stay_tied_in_another_number_format() -> None:
    """Otherwise the file has both, and the model a second matrix where it had one."""
    tied = torch.arange(6.0).view(2, 3)
    found = in_format({"embedding": tied, "head": tied.detach(), "row": tied[0]}, torch.bfloat16)
    assert found["head"] is found["embedding"]
    assert (found["head"].dtype, found["head"].tolist()) == (torch.bfloat16, [[0, 1, 2], [3, 4, 5]])
    assert found["row"].tolist() == [0, 1, 2]
