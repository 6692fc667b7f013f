"""The one object: rows, prompts, labels, action ids, its round trip, its fingerprints, its errors."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stoker_proto.actions import ActionCodec, StatisticsAccumulator, fit_codec
from stoker_proto.config import Config
from stoker_proto.errors import ConfigError, DataError
from stoker_proto.processor import Processor
from tests.tiny_models import make_config, write_model_folder

CODES = np.array([0, 1, 255, 7, 128, 64, 3], np.int32)
PAGE = "<s><|User|> {images} Push the cube <|Assistant|>"


@pytest.fixture(scope="module")
def codec() -> ActionCodec:
    """256 bins of a 7-DoF action: 7 tokens."""
    actions = np.random.default_rng(0).uniform(-1, 1, (500, 7)).astype(np.float32)
    accumulator = StatisticsAccumulator(7)
    accumulator.add(actions, np.arange(500, dtype=np.uint64))
    statistics, sample = accumulator.finish()
    return fit_codec("bins", sample, statistics, chunk=1)


def build(
    folder: Path, codec: ActionCodec | None, *overrides: str, family: str = "llava", max_seq_len: int = 256
) -> Processor:
    write_model_folder(folder, family)
    return Processor.build(make_config(folder, *overrides, max_seq_len=max_seq_len), codec)


def words(processor: Processor, ids: np.ndarray) -> str:
    text: str = processor._tokenizer.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    return text.replace("<image>" * 16, "<image>x16")


@pytest.mark.parametrize(
    ("family", "template", "expected"),
    [
        ("llava", "stoker", "<s><|User|> <image>x16 <image>x16 Push the Cube <|Assistant|>"),
        ("llava", "openvla", "<s><image>x16<image>x16In: What action should the robot take to push the cube?\nOut: "),
        ("llava", "chat_template", "<s><|User|> <image>x16 <image>x16 Push the Cube <|Assistant|>"),
        ("idefics3", "stoker", "<s><|User|> [<image>x16] [<image>x16] Push the Cube <|Assistant|>"),
        ("idefics3", "chat_template", "<s><|User|> [<image>x16] [<image>x16] Push the Cube <|Assistant|>"),
        ("paligemma", "stoker", "<image>x16<image>x16<s><|User|> Push the Cube <|Assistant|>\n"),
        ("causal", "stoker", "<s><|User|> Push the Cube <|Assistant|>"),
        ("causal", "openvla", "<s>In: What action should the robot take to push the cube?\nOut: "),
        ("causal", "chat_template", "<s><|User|> Push the Cube <|Assistant|>"),
    ],
)
def test_prompts(family: str, template: str, expected: str, tmp_path: Path) -> None:
    processor = build(tmp_path, None, f"data.dialogue.template={template}", family=family)
    text = words(processor, processor.prompt("Push the Cube", 0 if family == "causal" else 2))
    assert (
        text.replace("<fake_token_around_image><global-img>", "[").replace("<fake_token_around_image>", "]") == expected
    )


def test_rows_are_prompt_answer_end(tmp_path: Path, codec: ActionCodec) -> None:
    processor = build(tmp_path, codec)
    prompt = processor.prompt("Push the cube", 1)
    row = processor.encode("Push the cube", 1, codes=CODES)
    assert (row.input_ids.dtype, row.supervised.dtype) == (np.int32, np.uint8)
    assert row.input_ids.tolist() == [*prompt.tolist(), *(1023 - CODES).tolist(), processor.end_id]
    assert row.supervised.tolist() == [0] * len(prompt) + [1] * 8
    spoken = processor.encode("Push the cube", 1, answer="it is red")
    assert np.array_equal(spoken.input_ids[: len(prompt)], prompt)
    assert words(processor, spoken.input_ids[spoken.supervised == 1]) == " it is red</s>"


def test_a_transport_of_auto_is_jpeg_for_everybody(tmp_path: Path) -> None:
    auto, jpeg, base64 = (
        build(tmp_path, None, f"data.image.transport={name}").fingerprints()["image"]
        for name in ("auto", "jpeg", "base64")
    )
    assert auto == jpeg != base64


def test_rows_of_a_record_are_those_of_its_samples(tmp_path: Path, codec: ActionCodec) -> None:
    processor = build(tmp_path, codec)
    codes = np.stack([CODES, CODES[::-1], CODES // 2])
    rows = processor.encode_actions("Push the cube", 1, codes)
    assert rows is not None
    singles = [processor.encode("Push the cube", 1, codes=one) for one in codes]
    assert rows.input_ids.tolist() == [row.input_ids.tolist() for row in singles]
    assert [rows.supervised.tolist()] * 3 == [row.supervised.tolist() for row in singles]
    assert (rows.input_ids.dtype, rows.supervised.dtype) == (np.dtype("i4"), np.dtype("u1"))
    assert not rows.input_ids.flags.writeable
    assert not rows.supervised.flags.writeable
    short = build(tmp_path, codec, "data.max_seq_len=8")
    said = []
    for call in (lambda: short.encode("Push", 1, codes=CODES), lambda: short.encode_actions("Push", 1, codes)):
        with pytest.raises(DataError, match=r"the row needs \d+ tokens .* but data.max_seq_len is 8") as found:
            call()
        said.append(str(found.value))
    assert said[0] == said[1]
    with pytest.raises(DataError, match="action code 455: there are 256 codes"):
        processor.encode_actions("Push", 1, codes + 200)
    assert build(tmp_path, codec, "data.state=text").encode_actions("Push", 1, codes) is None


def test_actions_come_back(tmp_path: Path, codec: ActionCodec) -> None:
    actions = np.random.default_rng(1).uniform(-1, 1, (1, 1, 7)).astype(np.float32)
    for mode in ("reuse_last", "added"):
        processor = build(tmp_path, codec, f"data.action.vocabulary={mode}")
        row = processor.encode("Push", 1, codes=codec.encode(actions)[0])
        found = processor.actions_from_ids(row.input_ids[row.supervised == 1][:-1])
        assert found.shape == (1, 7)
        assert np.abs(found - actions[0]).max() <= 1 / 255 + 1e-6
        with pytest.raises(DataError, match="no action token"):
            processor.actions_from_ids(row.input_ids[-7:])


def test_added_tokens_follow_the_vocabulary(tmp_path: Path, codec: ActionCodec) -> None:
    processor = build(tmp_path, codec, "data.action.vocabulary=added")
    assert processor.vocabulary is not None
    assert (processor.vocabulary.first_id, processor.vocab_size_needed) == (1027, 1027 + 256)
    row = processor.encode("Push", 1, codes=np.array([0, 255], np.int32))
    assert words(processor, row.input_ids[-3:]) == "<action_0><action_255></s>"
    assert build(tmp_path / "b", codec).vocab_size_needed == 1027


def test_reuse_last_never_overruns_a_special_token(tmp_path: Path, codec: ActionCodec) -> None:
    write_model_folder(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    word = next(token for token, number in tokenizer["model"]["vocab"].items() if number == 900)
    tokenizer["added_tokens"].insert(3, {**tokenizer["added_tokens"][0], "id": 900, "content": word})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        ConfigError, match=r"last 256 of the tokenizer's 1024 .*special tokens among them .*vocabulary=added"
    ):
        Processor.build(make_config(tmp_path), codec)
    assert Processor.build(make_config(tmp_path, "data.action.vocabulary=added"), codec).vocabulary is not None


@pytest.mark.parametrize("family", ["llava", "idefics3", "paligemma", "causal"])
@pytest.mark.parametrize("mode", ["reuse_last", "added"])
def test_round_trip_is_exact(family: str, mode: str, tmp_path: Path, codec: ActionCodec) -> None:
    template = "chat_template" if mode == "added" else "openvla"
    overrides = [f"data.action.vocabulary={mode}", f"data.dialogue.template={template}", "data.image.transport=jpeg"]
    processor = build(tmp_path / "model", codec, *overrides, family=family)
    processor.save(tmp_path / "saved" / "deep")
    loaded = Processor.load(tmp_path / "saved" / "deep")
    other = Processor.from_json(processor.to_json(), tmp_path / "model" / "tokenizer.json")
    images = 0 if family == "causal" else 1
    row = processor.encode("Push the Cube", images, codes=CODES)
    frame = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    for again in (loaded, other):
        assert again.to_json() == processor.to_json()
        assert again.fingerprints() == processor.fingerprints()
        assert np.array_equal(again.encode("Push the Cube", images, codes=CODES).input_ids, row.input_ids)
        assert (again.pad_id, again.end_id, again.vocab_size_needed) == (2, 1, processor.vocab_size_needed)
        if images:
            assert again.encode_image(frame, 9) == processor.encode_image(frame, 9)
            assert again.image == processor.image


def test_fingerprints_name_what_differs(tmp_path: Path, codec: ActionCodec) -> None:
    base = build(tmp_path, codec).fingerprints()
    assert set(base) == {"tokenizer", "image", "image_libraries", "dialogue", "state", "codec", "vocabulary"}
    assert re.fullmatch(r"simplejpeg [\d.]+, (cykooz-resizer|pillow) [\d.]+", base["image_libraries"])
    changes = {
        "data.image.quality=90": "image",
        "data.augment.crop_area=0.8": "image",
        "data.dialogue.template=openvla": "dialogue",
        "data.max_seq_len=99": "dialogue",
        "data.action.vocabulary=added": "vocabulary",
    }
    for override, name in changes.items():
        other = build(tmp_path, codec, override).fingerprints()
        assert [key for key in base if base[key] != other[key]] == [name], override
    assert build(tmp_path, None).fingerprints()["codec"] == "none"
    larger = tmp_path / "larger"
    write_model_folder(larger, image_size=32)
    other = Processor.build(make_config(larger), codec).fingerprints()
    assert [key for key in base if base[key] != other[key]] == ["image"]


def test_another_tokenizer_is_refused(tmp_path: Path, codec: ActionCodec) -> None:
    processor = build(tmp_path, codec)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    assert tokenizer["model"]["merges"]
    first, second = tokenizer["model"]["merges"][:2]
    tokenizer["model"]["merges"][:2] = [second, first]
    (tmp_path / "other.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"other.json: not the tokenizer .*every host the same model folder"):
        Processor.from_json(processor.to_json(), tmp_path / "other.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"other.json: not a tokenizer"):
        Processor.from_json(processor.to_json(), tmp_path / "other.json")
    with pytest.raises(ConfigError, match=r"gone.json: the tokenizer cannot be read"):
        Processor.from_json(processor.to_json(), tmp_path / "gone.json")


def test_damaged_json_is_refused(tmp_path: Path, codec: ActionCodec) -> None:
    processor = build(tmp_path, codec)
    tree = json.loads(processor.to_json())
    file = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match="version 3: this program reads 2"):
        Processor.from_json(json.dumps({**tree, "version": 3}), file)
    for text in ("{", "[]", "null", json.dumps({key: value for key, value in tree.items() if key != "codec"})):
        with pytest.raises(DataError, match="not the JSON of a processor"):
            Processor.from_json(text, file)
    with pytest.raises(ConfigError, match=r"stoker_processor.json: the processor cannot be read"):
        Processor.load(tmp_path)


def test_nothing_is_cut(tmp_path: Path, codec: ActionCodec) -> None:
    processor = build(tmp_path, codec)
    needed = len(processor.encode("Push the cube", 1, codes=CODES).input_ids)
    exact = build(tmp_path, codec, max_seq_len=needed)
    assert len(exact.encode("Push the cube", 1, codes=CODES).input_ids) == needed
    short = build(tmp_path, codec, max_seq_len=needed - 1)
    with pytest.raises(
        DataError, match=rf"needs {needed} tokens \({needed - 8} of the prompt .* 7 of the answer.*{needed - 1}"
    ):
        short.encode("Push the cube", 1, codes=CODES)


def test_samples_that_cannot_be_written(tmp_path: Path, codec: ActionCodec) -> None:
    processor = build(tmp_path, codec)
    with pytest.raises(DataError, match="an action and an answer, or neither"):
        processor.encode("Push", 1)
    with pytest.raises(DataError, match="an action and an answer, or neither"):
        processor.encode("Push", 1, codes=CODES, answer="no")
    with pytest.raises(DataError, match=r"the prompt holds '<image>' 2 times for 1 images"):
        processor.prompt("Push the <image>", 1)
    with pytest.raises(DataError, match=r"the answer holds '<image>'"):
        processor.encode("Push", 1, answer="an <image>")
    with pytest.raises(DataError, match="action code 256: there are 256"):
        processor.encode("Push", 1, codes=np.array([256], np.int32))
    with pytest.raises(DataError, match="action code -1 is negative"):
        processor.encode("Push", 1, codes=np.array([-1], np.int32))
    text = build(tmp_path / "text", None, family="causal")
    with pytest.raises(DataError, match="the model takes text only"):
        text.prompt("Push", 1)
    with pytest.raises(DataError, match="the model takes text only"):
        text.encode_image(np.zeros((4, 4, 3), np.uint8), None)
    with pytest.raises(DataError, match="no action codec"):
        text.encode("Push", 0, codes=CODES)
    with pytest.raises(DataError, match="no action codec"):
        text.actions_from_ids(CODES)
    assert text.image is None
    assert text.image_token_id is None


def test_prompts_are_remembered_and_read_only(tmp_path: Path) -> None:
    processor = build(tmp_path, None)
    first = processor.prompt("Push", 1)
    assert processor.prompt("Push", 1) is first
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 5


def test_custom_template(tmp_path: Path) -> None:
    processor = build(
        tmp_path, None, "data.dialogue.template=custom", 'data.dialogue.user="{image} Q: {instruction} A:"'
    )
    assert words(processor, processor.prompt("{image} {x}", 1)) == "<s><image>x16 Q: {image} {x} A:"
    assert words(processor, processor.prompt("why", 0)) == "<s>Q: why A:"
    blind = build(tmp_path, None, "data.dialogue.template=custom", "data.dialogue.user=do {instruction}")
    with pytest.raises(DataError, match=r"data.dialogue.user has no \{image\}"):
        blind.prompt("it", 1)


def test_the_end_token_is_the_tokenizers_or_the_configs(tmp_path: Path) -> None:
    assert build(tmp_path, None).end_id == 1
    assert build(tmp_path, None, "data.dialogue.end=<|User|>").end_id == 1025
    with pytest.raises(ConfigError, match=r"data.dialogue.end is '<none>': the tokenizer has no such token"):
        build(tmp_path, None, "data.dialogue.end=<none>")
    write_model_folder(tmp_path, tokenizer_config={"eos_token": None, "pad_token": None})
    with pytest.raises(ConfigError, match=r"names no end-of-sequence token; set data.dialogue.end"):
        Processor.build(make_config(tmp_path), None)
    write_model_folder(
        tmp_path, tokenizer_config={"eos_token": None, "pad_token": None}, config={"eos_token_id": [1, 5]}
    )
    processor = Processor.build(make_config(tmp_path), None)
    assert (processor.end_id, processor.pad_id) == (1, 1)  # padding falls back on the end token


def test_tokens_that_the_tokenizer_lacks_are_plain_text(tmp_path: Path) -> None:
    write_model_folder(tmp_path, "causal")
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if "|" not in token["content"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    processor = Processor.build(make_config(tmp_path), None)
    ids = processor.prompt("Push", 0)
    assert words(processor, ids) == "<s><|User|> Push <|Assistant|>"
    assert max(ids) < 1024
    assert processor.vocab_size_needed == 1025  # nothing was added


def test_a_custom_template_needs_the_instruction(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.dialogue.user is 'hi': it needs \{instruction\}"):
        build(tmp_path, None, "data.dialogue.template=custom", "data.dialogue.user=hi")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the model folder has none"),
        ("{% for %}", "is not valid"),
        ("{{ raise_exception('no users here') }}", "no users here"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_bad_chat_templates_are_refused(template: str | None, message: str, tmp_path: Path) -> None:
    write_model_folder(tmp_path, "causal")
    (tmp_path / "chat_template.jinja").unlink()
    if template is not None:
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(ConfigError, match=message):
        Processor.build(make_config(tmp_path, "data.dialogue.template=chat_template"), None)


def test_a_chat_template_that_leaves_images_out_is_refused(tmp_path: Path) -> None:
    write_model_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% set c = messages[0]['content'] %}{{ c if c is string else c[-1]['text'] }}"
    )
    processor = Processor.build(make_config(tmp_path, "data.dialogue.template=chat_template"), None)
    with pytest.raises(DataError, match=r"writes 0 times '<image>' for 1 images"):
        processor.prompt("Push", 1)


@pytest.mark.process
def test_loading_needs_neither_torch_nor_transformers(tmp_path: Path, codec: ActionCodec) -> None:
    build(tmp_path, codec).save(tmp_path / "saved")
    code = (
        "import sys; from pathlib import Path; from stoker_proto.processor import Processor; "
        f"Processor.load(Path({str(tmp_path / 'saved')!r})); "
        "print(sorted({'torch', 'transformers', 'zmq', 'scipy'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.strip() == "[]"


def test_config_is_only_read(tmp_path: Path, codec: ActionCodec) -> None:
    write_model_folder(tmp_path)
    config = make_config(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert isinstance(config, Config)
    Processor.build(config, codec)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
