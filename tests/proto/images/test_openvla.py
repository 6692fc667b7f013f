"""OpenVLA's rows: ids, labels and places of patches, with a folder laid out as the published one."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, processors

from stoker_proto.actions import ActionCodec, ActionStatistics, fit_codec
from stoker_proto.errors import ConfigError, DataError
from stoker_proto.images.openvla import IMAGE_TOKEN_ID
from stoker_proto.images.spec import ImageSpec
from stoker_proto.processor import Processor
from stoker_proto.text.turns import Turn
from tests.tiny_models import make_config, write_model_folder

BLANK = 29871
CONFIG: dict[str, Any] = {
    "model_type": "openvla",
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "image_sizes": [224, 224],
    "image_resize_strategy": "resize-naive",
    "pad_token_id": 32000,
    "pad_to_multiple_of": 64,
    "text_config": {"model_type": "llama", "pad_token_id": 32000, "vocab_size": 32064},
}
IMAGE: dict[str, Any] = {
    "image_processor_type": "PrismaticImageProcessor",
    "image_resize_strategy": "resize-naive",
    "input_sizes": [[3, 224, 224], [3, 224, 224]],
    "interpolations": ["bicubic", "bicubic"],
    "means": [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5]],
    "stds": [[0.229, 0.224, 0.225], [0.5, 0.5, 0.5]],
}


def llama_tokenizer() -> Tokenizer:
    """Llama's layout: 32000 tokens, a blank at 29871 and letters behind it, rare characters last, `<PAD>` added behind all."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"filler{number}" for number in range(len(tokens), BLANK)]
    tokens += ["\u2581", *string.ascii_letters, *":?"]
    tokens += [f"rare{number}" for number in range(len(tokens), 32000)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    prepend: Any = normalizers.Prepend("\u2581")
    tokenizer.normalizer = normalizers.Sequence([prepend, normalizers.Replace(" ", "\u2581")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<PAD>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def write_published_folder(folder: Path, *, image: dict[str, Any] | None = None, **config: Any) -> Path:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<PAD>"}
    files = {
        "config": {**CONFIG, **config},
        "preprocessor_config": {**IMAGE, **(image or {})},
        "tokenizer_config": names,
    }
    for name, tree in files.items():
        (folder / f"{name}.json").write_text(json.dumps(tree))
    (folder / "tokenizer.json").write_text(llama_tokenizer().to_str())
    return folder


@pytest.fixture(scope="module")
def codec() -> ActionCodec:
    """Seven dimensions: the fourth never moves, the last is a gripper that is left as it is."""
    values = {
        "min": [-2.0, -1.0, -1.0, 0.25, -1.0, -1.0, 0.0],
        "max": [2.0, 1.0, 1.0, 0.25, 1.0, 1.0, 1.0],
        "q01": [-0.5, -1.0, -1.0, 0.25, -1.0, -1.0, 0.0],
        "q99": [0.5, 1.0, 1.0, 0.25, 1.0, 1.0, 1.0],
    }
    arrays: dict[str, Any] = {name: np.array(value) for name, value in values.items()}
    zeros, mask = np.zeros(7), np.array([True] * 6 + [False])
    statistics = ActionStatistics(count=100, mean=zeros, std=zeros, mask=mask, **arrays)
    return fit_codec("bins", np.zeros((1, 7), np.float32), statistics, chunk=1)


def build(folder: Path, codec: ActionCodec | None, template: str = "openvla") -> Processor:
    return Processor.build(make_config(folder, f"data.dialogue.template={template}", max_seq_len=512), codec)


@pytest.fixture(scope="module")
def processor(codec: ActionCodec, tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return build(write_published_folder(tmp_path_factory.mktemp("published")), codec)


def letters(text: str) -> list[int]:
    """Token ids of letters, by hand."""
    table = {" ": BLANK, "\n": 3 + 10} | {c: BLANK + 1 + i for i, c in enumerate(string.ascii_letters + ":?")}
    return [table[character] for character in text]


def test_the_prompt_ends_in_the_blank_that_the_published_code_appends(processor: Processor) -> None:
    ids = processor.prompt("Pick UP the Cube", 1).tolist()
    text = "In: What action should the robot take to pick up the cube?\nOut: "
    assert ids == [1, *[IMAGE_TOKEN_ID] * 256, BLANK, *letters(text)]
    assert ids[-1] == 29871


def test_action_ids_are_the_last_of_32000(processor: Processor, codec: ActionCodec) -> None:
    assert processor.vocabulary is not None
    assert (processor.vocabulary.first_id, processor.vocabulary.end_id) == (31744, 32000)
    assert processor.pad_id == 32000
    assert processor.vocab_size_needed == 32001, "the embedding's 32064 rows suffice"
    action = np.array([[[-0.5, 1.0, 0.0, 0.25, -2.0, 0.5, 1.0]]], np.float32)
    row = processor.encode("push", 1, codes=codec.encode(action)[0])
    normalised = np.array([-1.0, 1.0, 0.0, 0.0, -1.0, 0.5, 1.0])
    expected = (32000 - np.digitize(normalised, np.linspace(-1, 1, 256))).tolist()
    assert expected == [31999, 31744, 31872, 31872, 31999, 31808, 31744]
    assert row.input_ids[-8:].tolist() == [*expected, 2]
    assert row.supervised.tolist() == [0] * (len(row.input_ids) - 8) + [1] * 8
    decoded = processor.actions_from_ids(row.input_ids[-8:-1])[0]
    np.testing.assert_allclose(decoded, [-0.498, 0.996, 0.0, 0.25, -0.996, 0.502, 0.996], atol=1e-3)


def test_places_follow_the_first_token_whatever_the_template(codec: ActionCodec, tmp_path: Path) -> None:
    processor = build(write_published_folder(tmp_path), codec, "stoker")
    ids = processor.prompt("push", 2).tolist()
    assert ids[:513] == [1, *[IMAGE_TOKEN_ID] * 512]
    assert IMAGE_TOKEN_ID not in ids[513:]


def test_text_cannot_make_a_place(processor: Processor, codec: ActionCodec, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the instruction holds '<image>'"):
        processor.prompt("push <image>", 1)
    stoker = build(write_published_folder(tmp_path), codec, "stoker")
    turns = [Turn(role="user", text="What is it?"), Turn(role="assistant", text="A cube", learned=True)]
    assert IMAGE_TOKEN_ID not in stoker.encode_turns(turns).input_ids
    with pytest.raises(DataError, match="1 images in a dialogue: a model of the family openvla takes them behind"):
        stoker.encode_turns(turns, 1)


def test_its_json_comes_back_and_that_of_others_is_as_it_was(processor: Processor, tmp_path: Path) -> None:
    processor.save(tmp_path / "saved")
    again = Processor.load(tmp_path / "saved")
    assert again.image == processor.image
    assert again.to_json() == processor.to_json()
    assert again.prompt("push", 1).tolist() == processor.prompt("push", 1).tolist()
    other = Processor.build(make_config(write_model_folder(tmp_path / "llava")), None).image
    assert other is not None
    tree = other.to_json()
    assert not {"after_bos", "second_mean", "second_std"} & set(tree)
    assert ImageSpec.from_json(tree) == other
    with pytest.raises(DataError, match="missing or unknown values: third_mean"):
        ImageSpec.from_json({**tree, "third_mean": None})
    with pytest.raises(DataError, match="missing or unknown values: resample"):
        ImageSpec.from_json({name: value for name, value in tree.items() if name != "resample"})


@pytest.mark.long
@pytest.mark.parametrize(
    ("image", "config", "message"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, {}, "image processor CLIPImageProcessor in an OpenVLA"),
        ({"interpolations": ["bicubic", "bilinear"]}, {}, r"interpolations \['bicubic', 'bilinear'\] are not known"),
        ({"input_sizes": [[3, 224, 224], [3, 384, 384]]}, {}, "all must be one square"),
        ({}, {"image_sizes": [384, 384]}, r"its vision towers take \[384, 384\]"),
        ({"means": [[0.5, 0.5, 0.5]]}, {}, "two towers are expected"),
        (
            {"image_resize_strategy": "stretch"},
            {},
            "'stretch' is not known; known are resize-naive, resize-crop, letterbox",
        ),
        ({}, {"timm_model_ids": ["resnet50", "resnet50"]}, "'resnet50', which does not say the size of its patches"),
    ],
)
def test_what_is_not_known_is_refused(
    image: dict[str, Any], config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(write_published_folder(tmp_path, image=image, **config), None)
