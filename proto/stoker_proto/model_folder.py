"""The JSON files of a model's folder, read without transformers: all that a loader needs to know about a model.

config.json  tokenizer.json                            required
processor_config.json | preprocessor_config.json       required for models that see images
tokenizer_config.json  special_tokens_map.json  chat_template.jinja | chat_template.json     optional
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stoker_proto.errors import ConfigError
from stoker_proto.host.files import read_regular
from stoker_proto.host.hub_cache import explain_missing, find_model_folder
from stoker_proto.host.lfs import REASON, is_pointer

_KEY = "model.base_model_path"
MAX_TOKENIZER_BYTES = 256 << 20
"""Of tokenizer.json; the largest published ones have 35 MB."""
MAX_JSON_BYTES = 64 << 20
"""Of any other JSON file."""
MAX_TEMPLATE_BYTES = 1 << 20
"""Of a chat template; the largest published ones have 20 KB."""


class ModelFolder:
    """One model's folder. Raises ConfigError naming the file that is missing or damaged."""

    def __init__(self, path: str | Path) -> None:
        """path: the folder, or the id of a model in the hub's cache."""
        self.path = find_model_folder(str(path))
        if not self.path.is_dir():
            raise ConfigError(f"{_KEY} is {str(path)!r}: no such folder; {explain_missing(str(path))}")
        self.config = self.json("config.json")
        self.tokenizer_config = self.json("tokenizer_config.json", optional=True)

    @property
    def tokenizer_file(self) -> Path:
        """`tokenizer.json`, which every fast tokenizer has. Raises ConfigError where it is missing."""
        file = self.path / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(
                f"{_KEY} is {str(self.path)!r}: tokenizer.json is missing; write it with "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        return file

    def json(self, name: str, *, optional: bool = False) -> dict[str, Any]:
        """The object in a JSON file; {} where an optional file is missing. Raises ConfigError."""
        file = self.path / name
        if optional and not file.is_file():
            return {}
        try:
            content = read_regular(file, MAX_JSON_BYTES)
            refuse_pointer(file, content)
            tree = json.loads(content)
        except FileNotFoundError as error:
            raise ConfigError(f"{_KEY} is {str(self.path)!r}: {name} is missing ({error.strerror})") from error
        except OSError as error:
            raise ConfigError(f"{file}: it cannot be read ({error.strerror}); copy the model folder again") from error
        except ValueError as error:
            raise ConfigError(f"{file}: not JSON ({error}); copy the model folder again") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"{file}: a JSON object is expected, not {type(tree).__name__}")
        return tree

    def processor_configs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(the processor's own values, its image processor's values). Older models keep the latter in preprocessor_config.json.

        Raises ConfigError where no file describes the image processor."""
        processor = self.json("processor_config.json", optional=True)
        image = processor.get("image_processor")
        if not isinstance(image, dict):
            image = self.json("preprocessor_config.json", optional=True)
        if not image:
            raise ConfigError(
                f"{_KEY} is {str(self.path)!r}: neither processor_config.json nor preprocessor_config.json says how it takes "
                "images; write them with AutoProcessor.from_pretrained(...).save_pretrained(...)"
            )
        return processor, image

    def chat_template(self) -> str | None:
        """The model's jinja2 chat template, from the first file that has one; None where none has."""
        file = self.path / "chat_template.jinja"
        if file.is_file():
            return _template_text(file)
        for source in (self.json("chat_template.json", optional=True), self.tokenizer_config):
            template = source.get("chat_template")
            if isinstance(template, list):  # several, by name
                template = next((item.get("template") for item in template if item.get("name") == "default"), None)
            if isinstance(template, str):
                return template
        return None

    def stop_ids(self) -> tuple[int, ...]:
        """The ids at which the model stops when it generates, ascending: those that transformers reads."""
        text_config = self.config.get("text_config")
        sources = (self.json("generation_config.json", optional=True), self.config, text_config)
        for source in sources:
            ids = source.get("eos_token_id") if isinstance(source, dict) else None
            if ids is not None:
                return tuple(sorted(id for id in (ids if isinstance(ids, list) else [ids]) if isinstance(id, int)))
        return ()

    def special_tokens(self) -> dict[str, str]:
        """Name -> token, e.g. {"eos_token": "</s>", "image_token": "<image>"}."""
        tokens: dict[str, str] = {}
        for source in (self.json("special_tokens_map.json", optional=True), self.tokenizer_config):
            for name, value in source.items():
                text = value.get("content") if isinstance(value, dict) else value
                if name.endswith("_token") and isinstance(text, str):
                    tokens[name] = text
        return tokens


def refuse_pointer(file: Path, content: bytes) -> None:
    """Raises ConfigError where the file of a model is a Git LFS pointer."""
    if is_pointer(content):
        raise ConfigError(f"{file}: {REASON}")


def _template_text(file: Path) -> str:
    try:
        content = read_regular(file, MAX_TEMPLATE_BYTES)
        refuse_pointer(file, content)
        return content.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"{file}: the chat template cannot be read ({reason}); copy the model folder again"
        ) from error
