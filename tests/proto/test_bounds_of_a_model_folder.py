"""A model's folder comes from others: its files have a bound of size, and what they can do at the start has a bound of time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from stoker_proto import model_folder
from stoker_proto.errors import ConfigError
from stoker_proto.host.files import read_regular
from stoker_proto.model_folder import ModelFolder
from stoker_proto.text import chat_template
from stoker_proto.text.chat_template import ChatTemplate
from stoker_proto.text.tokenizer import TextTokenizer, load_tokenizer

USER = "{% for m in messages %}{{ m.content }}{% endfor %}"


def test_only_regular_files_within_the_cap_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_regular(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError, match="it has 5 bytes, and at most 4 are read"):
        read_regular(tmp_path / "file", 4)
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="it is no regular file"):
            read_regular(name, 5)


def test_files_of_a_model_folder_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    folder = ModelFolder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("x" * (model_folder.MAX_TEMPLATE_BYTES + 1))
    with pytest.raises(
        ConfigError, match=r"chat_template.jinja: .* at most 1048576 are read\); copy the model folder again"
    ):
        folder.chat_template()
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"tokenizer.json: the tokenizer cannot be read \(.*it is no regular file"):
        load_tokenizer(tmp_path / "tokenizer.json")
    monkeypatch.setattr(model_folder, "MAX_JSON_BYTES", 1)
    with pytest.raises(ConfigError, match=r"config.json: it cannot be read \(it has 2 bytes, and at most 1 are read\)"):
        ModelFolder(tmp_path)


@pytest.mark.long
def test_a_template_that_does_not_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_DEADLINE_S", 0.5)
    loops = "".join(f"{{% for i{n} in range(800) %}}" for n in range(3)) + "{% endfor %}" * 3
    with pytest.raises(ConfigError, match="the model's chat template takes more than 0 s for one user's turn"):
        ChatTemplate(USER + loops, {})


@pytest.mark.long
@pytest.mark.parametrize("expression", ["9 ** 9 ** 9", "'a' * 10 ** 9", "'a' * 2000000", "[0] * 2000000"])
def test_a_template_cannot_take_all_memory_in_one_step(expression: str) -> None:
    with pytest.raises(ConfigError, match=r"the model's chat template fails on one user's turn \(.* of large values"):
        ChatTemplate(USER + "{% set x = " + expression + " %}", {})


def test_small_products_of_templates_are_computed() -> None:
    template = ChatTemplate(USER + "{{ '=' * 3 }}{{ 6 * 7 }}", {})
    assert template.prompt("hello", 0, "<image>") == "hello===42"


@pytest.mark.long
def test_a_regex_of_the_tokenizer_that_blows_up_is_an_error() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"(([a-z]| )+)+\d$"), "isolated")
    made = TextTokenizer(tokenizer, {})
    with pytest.raises(
        ConfigError, match=r"the model's tokenizer fails on a short text .*retry-limit.*: use another tokenizer"
    ):
        assert made.fingerprint


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_git_lfs_pointer_in_a_model_folder_is_called_so(name: str, tmp_path: Path) -> None:
    for file in ("config.json", "tokenizer.json"):
        (tmp_path / file).write_text("{}")
    (tmp_path / name).write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
    )

    def read() -> None:
        folder = ModelFolder(tmp_path)
        folder.chat_template()
        load_tokenizer(folder.tokenizer_file)

    with pytest.raises(ConfigError, match=f"{name}: a Git LFS pointer, not the file itself: run `git lfs pull`"):
        read()
