"""The small models load through the Auto classes, take an image and text, and are the same for the same seed."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stoker_proto.errors import ConfigError

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

from trainer.models.tiny import build_tiny, main  # noqa: E402  (after the skips)

FRAME = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Push the red cube"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "done"}]},
]


@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_vision_models_reload_and_take_a_step(family: str, tmp_path: Path) -> None:
    parameters = build_tiny(family, tmp_path, image_size=32)
    assert 500_000 < parameters < 1_200_000
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    text = processor.apply_chat_template(CHAT)
    inputs = processor(text=[text], images=[FRAME], return_tensors="pt", add_special_tokens=False)
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 16
    assert inputs["pixel_values"].shape[-2:] == (32, 32)
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert abs(loss.item() - np.log(1088)) < 0.5  # random weights: about uniform over the vocabulary


def test_causal_model_marks_the_answer_of_its_chat_template(tmp_path: Path) -> None:
    build_tiny("causal", tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "Push it"}, {"role": "assistant", "content": "done"}]
    row = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    answer = [i for i, own in zip(row["input_ids"], row["assistant_masks"], strict=True) if own]
    assert tokenizer.decode(row["input_ids"]) == "<s><|User|> Push it <|Assistant|> done</s>"
    assert tokenizer.decode(answer) == " done</s>"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.vocab_size >= len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_one_seed_gives_one_model(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_tiny("causal", tmp_path / name, seed=seed)
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()


@pytest.mark.parametrize(("family", "size"), [("llava", 30), ("idefics3", 36), ("llava", 0), ("openvla", 30)])
def test_impossible_image_sizes_are_refused(family: str, size: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--image-size .*take a multiple of"):
        build_tiny(family, tmp_path, image_size=size)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--family", "llava", "--out", str(tmp_path), "--image-size", "30"]) == 2
    assert "multiple of 4" in capsys.readouterr().out
    assert main(["--family", "causal", "--out", str(tmp_path)]) == 0
    assert "918,400 parameters" in capsys.readouterr().out


@pytest.mark.process
def test_help_needs_no_torch() -> None:
    code = "import sys; from trainer.models import tiny; print('torch' in sys.modules or 'transformers' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.strip() == "False"
