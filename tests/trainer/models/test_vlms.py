"""More families of VLMs: pixels, tokens and loss are those of transformers' own image processors and models."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stoker_proto.config import ActionConfig, Config, ImageConfig
from stoker_proto.errors import ConfigError
from stoker_proto.processor import Processor
from tests.trainer.support.memory import Example, make_config, make_piece, make_processor
from trainer.feed.batch import IGNORED, BatchBuilder
from trainer.models.families import family_of, read_model_config
from trainer.models.tiny import VLMS, build_tiny
from trainer.policy import Policy
from trainer.training.inputs import InputMaker
from trainer.training.loss import nll_of_rows

PROCESSORS = {
    "smolvlm": "idefics3.image_processing_pil_idefics3:Idefics3ImageProcessorPil",
    "paligemma": "siglip.image_processing_pil_siglip:SiglipImageProcessorPil",
    "internvl": "got_ocr2.image_processing_pil_got_ocr2:GotOcr2ImageProcessorPil",
    "qwen2_5_vl": "qwen2_vl.image_processing_pil_qwen2_vl:Qwen2VLImageProcessorPil",
    "qwen3_vl": "qwen2_vl.image_processing_pil_qwen2_vl:Qwen2VLImageProcessorPil",
}
FRAMES = {
    "as large as the model's images": np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8),
    "larger": np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(9, 0).repeat(9, 1),
}  # 72 x 72: Qwen's own rule makes 64 x 64 of them too


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vlms")
    for family in VLMS:
        build_tiny(family, folder / family)
    return {family: folder / family for family in VLMS}


def config_of(family: str, models: dict[str, Path], tmp_path: Path) -> Config:
    size = (64, 64) if family.startswith("qwen") else None
    data = {"image": ImageConfig(transport="pixels", size=size), "action": ActionConfig(codec="bins")}
    return make_config(models[family], tmp_path, data=data)


def own_processor(family: str, folder: Path) -> Any:
    module, _, name = PROCESSORS[family].partition(":")
    kind = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    return kind.from_pretrained(folder, **({"do_image_splitting": False} if family == "smolvlm" else {}))


def inputs_of(config: Config, frame: Any, answer: str = "it is red") -> tuple[Processor, Any, Any]:
    """(processor, micro-batch, Inputs) of two rows: with an image, and a shorter one without."""
    processor = make_processor(config)
    examples = [
        Example(instruction="what colour is the cube?", frame=frame, answer=answer),
        Example(instruction="yes or no?", answer="no"),
    ]
    batch = BatchBuilder(decoder=processor, num_rows=2, max_tokens=96)([make_piece(examples, [0, 1], processor)])
    family = family_of(read_model_config(config.model.base_model_path))
    return processor, batch, InputMaker(processor, family, torch.device("cpu"), torch.float32)(batch)


def load(config: Config) -> Any:
    family = family_of(read_model_config(config.model.base_model_path))
    return family.auto_class.from_pretrained(config.model.base_model_path, dtype=torch.float32).train()


@pytest.mark.long
@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("family", VLMS)
def test_pixels_are_those_of_the_models_own_processor(
    family: str, frame: str, models: dict[str, Path], tmp_path: Path
) -> None:
    config = config_of(family, models, tmp_path)
    _, _, inputs = inputs_of(config, FRAMES[frame])
    theirs = own_processor(family, models[family])(images=[FRAMES[frame]], return_tensors="pt")
    levels = 1e-3 if frame.startswith("as") else 2.01  # resizers round differently
    scale = 1 / 255 / 0.25  # of one level in normalised pixels, at most
    ours, expected = (
        inputs.arguments["pixel_values"],
        theirs["pixel_values"].reshape(inputs.arguments["pixel_values"].shape),
    )
    np.testing.assert_allclose(ours.numpy(), expected.numpy(), rtol=0, atol=levels * scale)
    if family.startswith("qwen"):
        assert inputs.arguments["image_grid_thw"].tolist() == theirs["image_grid_thw"].tolist() == [[1, 8, 8]]


@pytest.mark.parametrize("family", VLMS)
def test_tokens_are_those_of_the_text_that_its_processor_makes(
    family: str, models: dict[str, Path], tmp_path: Path
) -> None:
    import transformers

    _, batch, _ = inputs_of(config_of(family, models, tmp_path), FRAMES["larger"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(models[family])
    image = "<image>" * 16
    around = {
        "smolvlm": f"<fake_token_around_image><global-img>{image}<fake_token_around_image>",
        "internvl": f"<img>{image}</img>",
        "qwen2_5_vl": f"<|vision_start|>{image}<|vision_end|>",
        "qwen3_vl": f"<|vision_start|>{image}<|vision_end|>",
    }
    if family == "paligemma":  # transformers `processing_paligemma.py`: images, <bos>, prompt, line feed, suffix, <eos>
        text = f"{image}<s><|User|> what colour is the cube? <|Assistant|>\n it is red</s>"
    else:
        text = f"<s><|User|> {around[family]} what colour is the cube? <|Assistant|> it is red</s>"
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    length = int(batch.attention_mask[0].sum())
    assert batch.input_ids[0, :length].tolist() == expected
    answer = tokenizer(" it is red</s>", add_special_tokens=False)["input_ids"]
    assert [id for id in batch.labels[0].tolist() if id != IGNORED] == answer


@pytest.mark.long
@pytest.mark.parametrize("family", VLMS)
def test_the_loss_is_that_of_the_model_with_its_own_processors_pixels(
    family: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """Row by row without padding, with transformers' own arguments and its own loss; and the image matters."""
    config = config_of(family, models, tmp_path)
    frame = FRAMES["as large as the model's images"]
    processor, batch, inputs = inputs_of(config, frame)
    model = load(config)
    with torch.no_grad():
        logits = model(**inputs.arguments, logits_to_keep=inputs.positions, use_cache=False).logits[:2]
        ours = nll_of_rows(logits.float(), inputs.targets)
        for row in range(2):
            length = int(batch.attention_mask[row].sum())
            ids = torch.from_numpy(batch.input_ids[row : row + 1, :length])
            labels = torch.from_numpy(batch.labels[row : row + 1, :length])
            own: dict[str, Any] = {}
            if row == 0:
                own |= own_processor(family, models[family])(images=[frame], return_tensors="pt")
            if family.startswith("qwen"):
                own["mm_token_type_ids"] = (ids == processor.image_token_id).int()
            if family == "paligemma":
                suffix = int((labels[0] != IGNORED).int().argmax())
                own["token_type_ids"] = torch.tensor([[0] * suffix + [1] * (length - suffix)])
            count = int((labels != IGNORED).sum())
            expected = model(input_ids=ids, labels=labels, use_cache=False, **own).loss * count
            torch.testing.assert_close(ours[row], expected, rtol=0, atol=2e-5 * count)
    _, _, other = inputs_of(config, 255 - frame)
    with torch.no_grad():
        changed = model(**other.arguments, logits_to_keep=other.positions, use_cache=False).logits[0]
    assert (changed - logits[0]).abs().max() > 1e-4


@pytest.mark.long
@pytest.mark.parametrize("family", VLMS)
def test_a_policy_decodes_with_a_cache_what_a_whole_row_predicts(
    family: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """The row that a loader would send for the policy's own action, through the path of training."""
    config = config_of(family, models, tmp_path)
    processor = make_processor(config).with_num_images((1, 1))
    assert processor.vocabulary is not None
    policy = Policy(load(config), processor, family_of(read_model_config(config.model.base_model_path)))
    make_inputs = InputMaker(processor, policy.family, torch.device("cpu"), torch.float32)
    for instruction in ("push the cube", "what colour is the large red cube at the back?"):
        ids = policy.action_ids(FRAMES["larger"], instruction)
        action = processor.actions_from_ids(ids)
        piece = make_piece([Example(instruction=instruction, frame=FRAMES["larger"], action=action)], [0], processor)
        inputs = make_inputs(BatchBuilder(decoder=processor, num_rows=1, max_tokens=96)([piece]))
        with torch.no_grad():
            logits = policy.model(**inputs.arguments, logits_to_keep=inputs.positions, use_cache=False).logits[0]
        first, end = processor.vocabulary.first_id, processor.vocabulary.end_id
        assert inputs.targets[0, : len(ids)].tolist() == ids.tolist()
        assert (logits[: len(ids), first:end].argmax(-1) + first).tolist() == ids.tolist()


def test_paligemmas_prompt_sees_itself_in_both_directions_and_the_answer_only_what_is_before(
    models: dict[str, Path], tmp_path: Path
) -> None:
    config = config_of("paligemma", models, tmp_path)
    _, batch, inputs = inputs_of(config, FRAMES["larger"])
    model, arguments = load(config), inputs.arguments
    first = int((batch.labels[0] != IGNORED).argmax())
    assert arguments["token_type_ids"][0].tolist()[: first + 1] == [0] * first + [1]
    with torch.no_grad():
        before = model(**arguments, use_cache=False).logits[0]
        for place, seen_from in ((first - 1, 0), (first + 1, first + 1)):
            ids = arguments["input_ids"].clone()
            ids[0, place] += 1
            after = model(**{**arguments, "input_ids": ids}, use_cache=False).logits[0]
            differs = (after - before).abs().amax(dim=-1) > 1e-5
            assert int(differs.int().argmax()) == seen_from, f"a change at {place}"


def test_qwens_size_is_asked_for_and_checked(models: dict[str, Path], tmp_path: Path) -> None:
    def config(size: tuple[int, int] | None, family: str = "qwen2_5_vl") -> Config:
        data = {"image": ImageConfig(size=size), "action": ActionConfig(codec="bins")}
        return make_config(models[family], tmp_path, data=data)

    with pytest.raises(ConfigError, match=r"set data.image.size to \[height, width\], both multiples of 16 pixels; "
                                          r"for frames of 256 x 256 its own processor would make \[256, 256\]"):  # fmt: skip
        make_processor(config(None))
    with pytest.raises(
        ConfigError, match=r"data.image.size is \[64, 72\]: this model takes multiples of 16, and 256 to"
    ):
        make_processor(config((64, 72)))
    with pytest.raises(
        ConfigError, match=r"data.image.size is \[32, 32\], but the model in .* takes images of 64 x 64 only"
    ):
        make_processor(config((32, 32), "internvl"))
    assert make_processor(config((64, 96))).image.num_tokens == 24  # type: ignore[union-attr]


def test_a_family_that_is_not_in_the_table_is_refused_by_loader_and_trainer(tmp_path: Path) -> None:
    import transformers

    config = transformers.Qwen2VLConfig()
    with pytest.raises(ConfigError, match="of type qwen2_vl, which sees images: known are llava, idefics3, smolvlm, "
                                          "paligemma, internvl, qwen2_5_vl, qwen3_vl, openvla, stoker_robot; take"):  # fmt: skip
        family_of(config)
