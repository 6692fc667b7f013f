"""The small policy: it reads its prompt, answers in one pass or token by token alike, learns, and loads without Stoker too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stoker_proto.actions import StatisticsAccumulator, fit_codec
from stoker_proto.config import Config, ImageConfig
from stoker_proto.errors import ConfigError
from stoker_proto.processor import Processor
from tests.trainer.support.memory import make_config
from tests.trainer.support.ranks import run_ranks
from trainer.build import build_engine
from trainer.checkpoints.export import gather_weights
from trainer.checkpoints.save import Checkpoints
from trainer.engine.zero import join_ranks
from trainer.models.families import family_of, read_model_config
from trainer.models.robot.building import RobotSizes
from trainer.models.robot.modeling import RobotConfig
from trainer.models.tiny import build_tiny
from trainer.policy import Policy
from trainer.policy_io import PolicyInput

SIZES = RobotSizes(num_views=2, state_width=3, auxiliary_width=6, answer_tokens=4)
VIEWS = [{"crop": [0, 0, 16, 16]}, {"hand": [8, 8]}]
MEASURED = {
    "tcp_pose": np.array([0.1, 0.0, 0.0, 1, 0, 0, 0], np.float32),
    "intrinsic_cv": np.array([[10, 0, 12], [0, 10, 9], [0, 0, 1]], np.float32),
    "extrinsic_cv": np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]], np.float32),
}


@pytest.fixture(scope="module")
def robot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("robot")
    build_tiny("robot", folder, image_size=16, robot=SIZES)
    return folder


def statistics(width: int) -> Any:
    accumulator = StatisticsAccumulator(width)
    accumulator.add(np.random.default_rng(0).uniform(-1, 1, (512, width)), np.arange(512, dtype=np.uint64))
    return accumulator.finish()


def config_of(robot: Path, out: Path) -> Config:
    data = {"state": "text", "options": {"views": VIEWS}, "image": ImageConfig(transport="pixels")}
    return make_config(robot, out, data=data)


def processor_of(robot: Path, out: Path) -> Processor:
    found, sample = statistics(3)
    codec = fit_codec("bins", sample, found, chunk=1, num_bins=16)
    return Processor.build(config_of(robot, out), codec, statistics(3)[0])


@pytest.fixture
def processor(robot: Path, tmp_path: Path) -> Processor:
    return processor_of(robot, tmp_path)


@pytest.fixture
def model(robot: Path) -> Any:
    family = family_of(read_model_config(str(robot)))
    return family.auto_class.from_pretrained(robot, dtype=torch.float32).eval()


def rows_of(processor: Processor, instructions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask) int64[B, T] of rows with an action and a state, padded."""
    rng = np.random.default_rng(3)
    rows = [
        processor.encode(
            text, 2, codes=rng.integers(0, 15, 3).astype(np.int32), state=rng.uniform(-1, 1, 3).astype(np.float32)
        ).input_ids
        for text in instructions
    ]
    length = max(map(len, rows)) + 3
    ids = np.full((len(rows), length), processor.pad_id, np.int64)
    mask = np.zeros((len(rows), length), np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


@pytest.mark.long
def test_each_number_of_the_state_is_one_token_and_is_read_back(processor: Processor, model: Any) -> None:
    state = np.array([-0.97, 0.0, 0.5], np.float32)
    ids = torch.from_numpy(processor.prompt("move 9 cm back and 12 up", 2, state).astype(np.int64))[None]
    before = torch.ones_like(ids, dtype=torch.bool)
    values, is_state = model._read_state(ids, before, torch.tensor([True]))
    assert is_state.sum() == 3
    np.testing.assert_allclose(values[0].numpy(), state, atol=0.02)  # 256 bins over about [-0.98, 0.98]


def test_one_pass_and_token_by_token_give_the_same_logits(processor: Processor, model: Any) -> None:
    ids, mask = rows_of(processor, ["push the cube", "push the cube", "pull"])
    pixels = torch.rand(6, 3, 16, 16)
    begin = int((ids[0] == model.config.assistant_token_id).nonzero()[0, 0])
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask, pixel_values=pixels)
        kept = torch.tensor([begin, begin + 2])
        some = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, logits_to_keep=kept)
        prompt = model(input_ids=ids[:1, : begin + 1], pixel_values=pixels[:2], use_cache=True)
        steps, cache = [prompt.logits[:, -1]], prompt.past_key_values
        for token in range(3):
            # Other tokens than the row's: they are not read.
            step = model(input_ids=ids[:1, token : token + 1], past_key_values=cache, use_cache=True)
            steps.append(step.logits[:, -1])
            cache = step.past_key_values
    torch.testing.assert_close(torch.stack(steps, 1)[0], whole.logits[0, begin : begin + 4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(some.logits, whole.logits[:, kept], rtol=0, atol=0)
    assert whole.auxiliary.shape == (3, 6)
    assert not whole.logits[0, :begin].any()  # before the answer it predicts nothing
    assert (steps[0] - steps[1]).abs().max() > 1e-3  # positions differ


def test_rows_do_not_mix_and_padding_rows_need_no_image(processor: Processor, model: Any) -> None:
    ids, mask = rows_of(processor, ["push the cube", "pull it to the very far goal"])
    pixels = torch.rand(4, 3, 16, 16)
    padding = torch.full((1, ids.shape[1]), processor.pad_id)
    padded_mask = torch.cat([mask, torch.tensor([[1] + [0] * (ids.shape[1] - 1)])])
    with torch.no_grad():
        both = model(input_ids=torch.cat([ids, padding]), attention_mask=padded_mask, pixel_values=pixels).logits
        alone = model(input_ids=ids[1:], attention_mask=mask[1:], pixel_values=pixels[2:]).logits
        other = model(input_ids=ids[1:], attention_mask=mask[1:], pixel_values=pixels[:2]).logits
        dummy = model(input_ids=padding, attention_mask=torch.ones_like(padding)).logits
    torch.testing.assert_close(both[1], alone[0], rtol=1e-3, atol=1e-3)
    assert (other - alone).abs().max() > 0.01  # it looks at the images
    assert torch.isfinite(both).all()
    assert not dummy.any()


@pytest.mark.parametrize(("change", "message"), [
    ("images", r"rows have \[1\] images each: this model takes 2"),
    ("state", "does not end with a state of 3 numbers"),
    ("answer", "an answer of 7 tokens: this model has 4 answer positions"),
])  # fmt: skip
def test_a_row_that_it_cannot_read_is_an_error(processor: Processor, model: Any, change: str, message: str) -> None:
    ids, mask = rows_of(processor, ["push the cube"])
    pixels = torch.rand(2, 3, 16, 16)
    if change == "images":
        first = (ids[0] == model.config.image_token_id).nonzero()[:4, 0]
        ids[0, first] = model.config.assistant_token_id + 1
        pixels = pixels[:1]
    elif change == "state":
        numbers = torch.isin(ids[0], torch.tensor(model.config.number_ids)).nonzero()[:, 0]
        ids[0, numbers[-1]] = processor.pad_id + 1
    else:
        mask[:] = 1
    with pytest.raises(ValueError, match=message):
        model(input_ids=ids, attention_mask=mask, pixel_values=pixels)


def weights_under_zero3(robot: Path, out: Path, rank: int) -> dict[str, Any]:
    config, ranks = config_of(robot, out), join_ranks()
    assert config.trainer.zero_stage == 3
    engine = build_engine(config, ranks, processor_of(robot, out), Checkpoints(config, ranks), None)
    return {name: tensor.numpy() for name, tensor in gather_weights(engine).items()}


@pytest.mark.process
def test_zero3_loads_every_weight_of_it(model: Any, robot: Path, tmp_path: Path) -> None:
    [found, _] = run_ranks(2, partial(weights_under_zero3, robot, tmp_path))
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_array_equal(found[name], weight.numpy(), err_msg=name)


@pytest.mark.long
def test_a_policy_sees_the_views_and_a_few_steps_teach_it(processor: Processor, model: Any, robot: Path) -> None:
    family = family_of(read_model_config(str(robot)))
    policy = Policy(model, processor, family)
    frame = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    state = np.array([0.1, 0.2, 0.3], np.float32)
    told = PolicyInput(images=[frame], instruction="push the cube", state=state, measurements=MEASURED)
    seen: list[torch.Tensor] = []
    handle = model.register_forward_pre_hook(
        lambda _, __, named: seen.append(named["pixel_values"]) if "pixel_values" in named else None, with_kwargs=True
    )
    [before] = policy.predict([told])
    handle.remove()
    crop, hand = ((2 * image / 255 - 1).permute(0, 2, 1) for image in seen[0].new_tensor(
        np.stack([processor.image_pixels(image) for image in processor.see([frame], MEASURED)])
    ).permute(0, 3, 2, 1))  # fmt: skip
    torch.testing.assert_close(seen[0], torch.stack([crop, hand]), rtol=0, atol=1e-5)
    wanted = np.array([[0.5, -0.5, 0.25]], np.float32)
    assert processor.codec is not None
    row = processor.encode("push the cube", 2, codes=processor.codec.encode(wanted[None])[0], state=state)
    ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(25):
        logits = model(input_ids=ids, pixel_values=seen[0]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits[0, -4:], ids[0, -4:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    [after] = policy.predict([told])
    np.testing.assert_allclose(after.actions, wanted, atol=0.13)  # half of a bin of 15
    assert after.outside_mass < before.outside_mass


@pytest.mark.process
@pytest.mark.slow
def test_it_may_be_the_first_module_that_imports_transformers() -> None:
    program = (
        "from trainer.models.robot.modeling import RobotPolicy\n"
        "import transformers\n"
        "print(transformers.AutoConfig.for_model('stoker_robot').model_type)"
    )
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True, text=True, check=False, env=environment, timeout=300,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert found.stdout.split()[-1] == "stoker_robot"


@pytest.mark.process
def test_a_saved_model_loads_with_the_auto_classes_alone(model: Any, robot: Path, tmp_path: Path) -> None:
    """In a process that cannot import this repository."""
    model.save_pretrained(tmp_path / "export")
    assert (tmp_path / "export" / "modeling.py").is_file()
    program = """
import sys
sys.path[:] = [path for path in sys.path if path not in ("", ".")]
sys.modules["trainer"] = sys.modules["stoker_proto"] = None
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
processor = AutoProcessor.from_pretrained(sys.argv[2])
print(type(model).__name__, sum(p.double().sum().item() for p in model.parameters()), type(processor).__name__)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "DS_ACCELERATOR": "cpu"}
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(tmp_path / "export"), str(robot)],
        capture_output=True, text=True, check=False, env=environment, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    name, total, processor_name = found.stdout.split()[-3:]
    assert (name, processor_name) == ("RobotPolicy", "LlavaProcessor")
    assert float(total) == pytest.approx(sum(p.double().sum().item() for p in model.parameters()), abs=1e-6)


def test_words_that_are_read_together_are_told_apart_by_their_order_from_the_start(tmp_path: Path) -> None:
    """Both instructions have the same words; what a random model makes of them is what its training begins with."""
    texts = ["stack the red cube on the green cube", "stack the green cube on the red cube"]
    apart = {}
    for window in (0, 5):
        folder = tmp_path / str(window)
        build_tiny("robot", folder, image_size=16, robot=replace(SIZES, word_window=window))
        processor = processor_of(folder, tmp_path)
        model = family_of(read_model_config(str(folder))).auto_class.from_pretrained(folder)
        state = np.zeros(3, np.float32)
        ids = torch.from_numpy(np.stack([processor.prompt(text, 2, state) for text in texts]).astype(np.int64))
        with torch.no_grad():
            first, second = model._read_words(ids, ids != model.config.image_token_id)
        apart[window] = float((first - second).norm() / first.norm())
    assert apart[0] < 0.01
    assert apart[5] > 0.03


@pytest.mark.parametrize("window", [0, 5])
def test_words_mean_the_same_in_any_company(tmp_path: Path, window: int) -> None:
    """A row's words, at the same places, whatever the row's other tokens are and whatever rows are in the batch."""
    build_tiny("robot", tmp_path, image_size=16, robot=replace(SIZES, word_window=window))
    model = family_of(read_model_config(str(tmp_path))).auto_class.from_pretrained(tmp_path)
    ids = torch.tensor([[3, 900, 901, 40, 41, 42, 9, 9], [3, 900, 901, 50, 51, 52, 53, 54], [7] * 8])
    is_word = torch.tensor([[1, 0, 0, 1, 1, 1, 0, 0], [1, 0, 0, 1, 1, 1, 1, 1], [0] * 8], dtype=torch.bool)
    others = torch.where(is_word, ids, 17)
    with torch.no_grad():
        together, alone = model._read_words(ids, is_word), model._read_words(ids[:1], is_word[:1])
        moved = model._read_words(ids[:1].roll(1, 1), is_word[:1].roll(1, 1))
        torch.testing.assert_close(model._read_words(others, is_word), together, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(together[:1], alone, atol=1e-6, rtol=1e-5)
    assert together.isfinite().all()
    assert (moved - alone).abs().max() > 1e-4  # the place of a word counts


@pytest.mark.parametrize("window", [-1, 4])
def test_a_window_has_a_middle(tmp_path: Path, window: int) -> None:
    with pytest.raises(ConfigError, match=f"--word-window {window}: an odd number, or 0"):
        build_tiny("robot", tmp_path, image_size=16, robot=replace(SIZES, word_window=window))


def test_a_model_whose_words_would_be_read_differently_is_refused() -> None:
    assert RobotConfig(word_position_scale=0.1).word_window == 0
    with pytest.raises(ValueError, match="word_position_scale is gone"):
        RobotConfig(word_position_scale=1.0)


@pytest.mark.parametrize(
    ("towers", "capabilities", "in_bfloat16"),
    [
        ("auto", {"avx2": True, "amx_bf16": False, "avx512_bf16": False}, False),
        ("auto", {"amx_bf16": True}, True),
        ("auto", {"avx512_bf16": True}, True),
        ("auto", {}, False),
        ("float32", {"amx_bf16": True}, False),
        ("bfloat16", {}, True),
    ],
)
def test_convolutions_compute_in_bfloat16_where_the_machine_has_instructions_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, towers: str, capabilities: dict[str, bool], in_bfloat16: bool
) -> None:
    """Emulated, they take nine times as long; the export keeps the choice."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    build_tiny("robot", tmp_path, image_size=16, robot=replace(SIZES, towers=towers))
    assert json.loads((tmp_path / "config.json").read_text())["half_precision_towers"] is in_bfloat16


def test_other_towers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--towers 'int8': choose one of auto, float32, bfloat16"):
        build_tiny("robot", tmp_path, image_size=16, robot=replace(SIZES, towers="int8"))
