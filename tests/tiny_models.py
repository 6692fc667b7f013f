"""The JSON files of a small model's folder, as `trainer.models.tiny` writes them, but without torch or transformers.

For tests that need a tokenizer and an image processor's description, not weights. A test in `tests/proto` compares the two.
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from stoker_proto.config import Config
from stoker_proto.config.reader import load_config
from trainer.models.tiny_tokenizer import ASSISTANT, BOS, EOS, IMAGE, PAD, USER, build_tokenizer

IDEFICS_TOKENS = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|User|> "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    " {% endfor %}{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
TINY_IMAGE_TOKEN_ID = 1024


def write_model_folder(
    folder: Path,
    family: str = "llava",
    *,
    image_size: int = 64,
    image_processor: dict[str, Any] | None = None,
    processor: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    tokenizer_config: dict[str, Any] | None = None,
) -> Path:
    """Write the files of a model of the family; the dicts are put over its values, None takes a key away."""
    configs: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "llava": _llava(image_size),
        "idefics3": _idefics3(image_size),
        "paligemma": _paligemma(image_size),
        "causal": ({"model_type": "llama"}, {}),
    }
    model, parts = configs[family]
    if parts:
        parts = _over({**parts, "image_processor": _over(parts["image_processor"], image_processor)}, processor)
        _write(folder / "processor_config.json", parts)
    _write(folder / "config.json", _over(model, config))
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "image_token": IMAGE}
    _write(folder / "tokenizer_config.json", _over(names, tokenizer_config))
    (folder / "tokenizer.json").write_text(_tokenizer_json(IDEFICS_TOKENS if family == "idefics3" else ()))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def make_config(folder: Path, *overrides: str, max_seq_len: int = 256) -> Config:
    """A config whose model is in the folder; overrides as after `--set`."""
    file = folder / "stoker.yaml"
    tree = {
        "model": {"base_model_path": str(folder)},
        "data": {"dataset_type": "mani_openpi", "train_data_paths": ["demos.jsonl"], "max_seq_len": max_seq_len}
        | {"dialogue": {"template": "stoker"}},
        "trainer": {"micro_batch_size": 1, "global_batch_size": 1, "lr": 1e-3},
    }
    file.write_text(json.dumps(tree))
    return load_config(file, list(overrides))


def cached_in(folder: Path, config: Config) -> Config:
    """The config with this cache folder."""
    return replace(config, data=replace(config.data, cache_dir=str(folder)))


@cache
def _tokenizer_json(extra_tokens: tuple[str, ...]) -> str:
    return build_tokenizer(extra_tokens).to_str()


def _llava(size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    image = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
    }
    processor = {
        "image_processor": image,
        "patch_size": size // 4,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    vision = {"model_type": "clip_vision_model", "image_size": size, "patch_size": size // 4}
    return {"model_type": "llava", "image_token_index": TINY_IMAGE_TOKEN_ID, "vision_config": vision}, processor


def _idefics3(size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    edge = {"longest_edge": size}
    image = {"image_processor_type": "Idefics3ImageProcessor", "size": edge, "max_image_size": edge}
    vision = {"model_type": "idefics3_vision", "image_size": size, "patch_size": size // 8}
    model = {
        "model_type": "idefics3",
        "image_token_id": TINY_IMAGE_TOKEN_ID,
        "scale_factor": 2,
        "vision_config": vision,
    }
    return model, {"image_processor": image, "image_seq_len": 16}


def _paligemma(size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    image = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": size, "width": size},
        "image_seq_length": 16,
    }
    vision = {"model_type": "siglip_vision_model", "image_size": size, "patch_size": size // 4}
    return (
        {"model_type": "paligemma", "image_token_index": TINY_IMAGE_TOKEN_ID, "vision_config": vision},
        {"image_processor": image},
    )


def _over(values: dict[str, Any], changes: dict[str, Any] | None) -> dict[str, Any]:
    merged = {**values, **(changes or {})}
    return {name: value for name, value in merged.items() if value is not None}


def _write(file: Path, tree: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(tree))


__all__ = ["ASSISTANT", "TINY_IMAGE_TOKEN_ID", "USER", "make_config", "write_model_folder"]
