"""Leading tokens, names, sizes and the fingerprint of a model's tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from stoker_proto.errors import ConfigError
from stoker_proto.model_folder import ModelFolder
from stoker_proto.text.tokenizer import TextTokenizer
from tests.tiny_models import write_model_folder


def small(single: str | None, special: tuple[str, ...] = ("<s>", "</s>")) -> TextTokenizer:
    """A tokenizer of words, with Llama's pre-tokenizer and this post-processor."""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, "▁a": 3, "▁b": 4, "b": 5}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(list(special))
    if single:
        pairs = [(token, vocabulary[token]) for token in special]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=pairs)
    return TextTokenizer(tokenizer, {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.mark.parametrize(
    ("single", "leading"), [(None, []), ("<s> $A", [0]), ("<s> $A </s>", [0]), ("$A </s>", []), ("<s> <s> $A", [0, 0])]
)
def test_leading_tokens_are_those_of_the_post_processor(single: str | None, leading: list[int]) -> None:
    tokenizer = small(single)
    assert tokenizer.leading == leading
    assert tokenizer.encode("a b") == [3, 4]  # neither leading nor trailing ones


def test_a_saved_file_cuts_and_pads_nothing(tmp_path: Path) -> None:
    folder = ModelFolder(write_model_folder(tmp_path, "causal"))
    tokenizer = Tokenizer.from_file(str(folder.tokenizer_file))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(folder.tokenizer_file))
    assert len(TextTokenizer.from_folder(folder).encode("Push the red cube to the goal, please")) > 3


def test_names_come_from_wherever_the_model_keeps_them(tmp_path: Path) -> None:
    nothing = {"bos_token": None, "eos_token": None, "pad_token": None}
    write_model_folder(tmp_path, tokenizer_config=nothing, config={"text_config": {"eos_token_id": 1}})
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<pad>", "special": True}}))
    tokenizer = TextTokenizer.from_folder(ModelFolder(tmp_path))
    assert [tokenizer.named_id(f"{kind}_token") for kind in ("bos", "eos", "pad")] == [None, 1, 2]


def test_the_fingerprint_is_of_the_tokenizer_not_of_its_file(tmp_path: Path) -> None:
    folder = ModelFolder(write_model_folder(tmp_path, "causal"))
    original = TextTokenizer.from_folder(folder)
    expected = original.fingerprint
    original.add_actions("added", 16)
    original.save(tmp_path / "tokenizer.json")  # other bytes, and action tokens
    again = TextTokenizer.from_folder(folder)
    assert again.size == 1027 + 16
    assert again.fingerprint == expected
    again.tokenizer.add_tokens(["<other>"])
    assert TextTokenizer(again.tokenizer, {}).fingerprint != expected
    assert small("<s> $A").fingerprint != small("<s> $A </s>").fingerprint or small("<s> $A").leading == [0]
    assert small("<s> $A").fingerprint != small(None).fingerprint


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "NFC"},
        {"type": "NFD"},
        {"type": "NFKC"},
        {"type": "NFKD"},
        {"type": "Lowercase"},
        {"type": "Strip", "strip_left": True, "strip_right": False},
        {"type": "Replace", "pattern": {"String": "\u00b2"}, "content": "2"},
        {"type": "Replace", "pattern": {"String": "\u00a0"}, "content": " "},
        {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": False,
            "strip_accents": False,
            "lowercase": False,
        },
    ],
)
def test_the_fingerprint_shows_how_texts_are_normalised(tmp_path: Path, normalizer: dict[str, Any]) -> None:
    """Two hosts that differ in this cut the same text differently, with one and the same vocabulary."""
    folder = ModelFolder(write_model_folder(tmp_path, "causal"))
    plain = TextTokenizer.from_folder(folder).fingerprint
    tree = json.loads(folder.tokenizer_file.read_text())
    assert tree["normalizer"] is None
    folder.tokenizer_file.write_text(json.dumps({**tree, "normalizer": normalizer}))
    assert TextTokenizer.from_folder(folder).fingerprint != plain


def test_the_fingerprint_tells_normal_forms_apart(tmp_path: Path) -> None:
    folder = ModelFolder(write_model_folder(tmp_path, "causal"))
    tree = json.loads(folder.tokenizer_file.read_text())
    found = set()
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        folder.tokenizer_file.write_text(json.dumps({**tree, "normalizer": {"type": form}}))
        found.add(TextTokenizer.from_folder(folder).fingerprint)
    assert len(found) == 4


def test_actions_are_added_once_and_only_in_order(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.from_folder(ModelFolder(write_model_folder(tmp_path, "causal")))
    first = tokenizer.add_actions("added", 16)
    assert tokenizer.add_actions("added", 16) == first
    assert tokenizer.size == 1027 + 16
    other = TextTokenizer.from_folder(ModelFolder(write_model_folder(tmp_path, "causal")))
    other.tokenizer.add_tokens(["<action_1>"])
    with pytest.raises(ConfigError, match=r"has some of <action_0> ... <action_3> already, but not all in order"):
        other.add_actions("added", 4)


def test_reuse_last_leaves_other_tokens(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"last 6 of the tokenizer's 6 tokens .*; use data.action.vocabulary=added"):
        small(None).add_actions("reuse_last", 6)
    assert small(None).add_actions("reuse_last", 3).to_ids([0, 1, 2]).tolist() == [5, 4, 3]
    with pytest.raises(ConfigError, match=r"special tokens among them \(</s>\)"):
        small(None).add_actions("reuse_last", 5)
