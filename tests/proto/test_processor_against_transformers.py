"""The same prompts, placeholders and pixels as transformers' own processors give for the same folder."""

import json
from pathlib import Path

import numpy as np
import pytest

from stoker_proto.processor import Processor
from tests.tiny_models import make_config, write_model_folder

transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")

FRAME = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=["llava", "idefics3"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that trainer.models.tiny wrote."""
    from trainer.models.tiny import build_tiny

    folder = tmp_path_factory.mktemp(request.param)
    build_tiny(request.param, folder)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("num_images", [1, 2])
def test_prompts_equal_those_of_auto_processor(tiny: Path, num_images: int) -> None:
    theirs = transformers.AutoProcessor.from_pretrained(tiny)
    images = [FRAME] * num_images
    text = f"<|User|> {'<image> ' * num_images}Push the cube <|Assistant|>"
    expected = theirs(text=[text], images=[images])
    ours = Processor.build(make_config(tiny), None)
    assert ours.prompt("Push the cube", num_images).tolist() == list(expected["input_ids"][0])
    assert ours.image_token_id == theirs.image_token_id
    chat = Processor.build(make_config(tiny, "data.dialogue.template=chat_template"), None)
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": "Push the cube"}]
    turn = [{"role": "user", "content": content}]
    ids = theirs.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"][0]
    assert chat.prompt("Push the cube", num_images).tolist() == list(ids)


def test_normalised_pixels_equal_those_of_auto_processor(tiny: Path) -> None:
    theirs = transformers.AutoProcessor.from_pretrained(tiny)
    ours = Processor.build(make_config(tiny), None)
    assert ours.image is not None
    expected = np.asarray(theirs.image_processor(FRAME)["pixel_values"]).reshape(3, 64, 64).transpose(1, 2, 0)
    image = ours.image
    found = (ours.image_pixels(FRAME) * image.rescale - np.array(image.mean)) / np.array(image.std)
    assert np.abs(found - expected).max() <= 2 / 255 / min(image.std) + 1e-5


def test_the_json_of_our_tests_is_that_of_the_model(tiny: Path, tmp_path: Path) -> None:
    family = json.loads((tiny / "config.json").read_text())["model_type"]
    ours = Processor.build(make_config(tiny), None)
    written = Processor.build(make_config(write_model_folder(tmp_path, family)), None)
    assert written.image == ours.image
    assert written.fingerprints()["tokenizer"] == ours.fingerprints()["tokenizer"]
    assert np.array_equal(written.prompt("Push", 1), ours.prompt("Push", 1))


def test_paligemma_prompts(tmp_path: Path) -> None:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    write_model_folder(tmp_path, "paligemma")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    images = SiglipImageProcessorPil(size={"height": 64, "width": 64}, image_seq_length=16)
    images.image_seq_length = 16
    theirs = transformers.PaliGemmaProcessor(image_processor=images, tokenizer=tokenizer)
    theirs.save_pretrained(tmp_path)
    config = make_config(tmp_path, "data.dialogue.template=custom", "data.dialogue.user='{instruction}'")
    ours = Processor.build(config, None)
    expected = theirs(text=["<image>push the cube"], images=[[FRAME]])
    assert ours.prompt("push the cube", 1).tolist() == list(expected["input_ids"][0])
    row = ours.encode("push the cube", 1, answer="done")
    with_answer = theirs(text=["<image>push the cube"], images=[[FRAME]], suffix=["done"])
    assert row.input_ids.tolist() == list(with_answer["input_ids"][0])
    labels = np.where(row.supervised, row.input_ids, -100)
    assert labels.tolist() == np.asarray(with_answer["labels"])[0].tolist()
