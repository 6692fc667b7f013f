"""Small random models that need no download: `python -m trainer.models.tiny --family llava --out models/tiny-llava`.

About a million parameters each, with the tokenizer of `tiny_tokenizer.py`, the model's own image processor and a chat
template: AutoProcessor, AutoTokenizer, AutoModelForImageTextToText and AutoModelForCausalLM load it like any other. An OpenVLA
loads after `import trainer.models`; it has no chat template, and only Stoker reads its processor.
An image is always 16 tokens: the patch size follows the image size. `robot` is a policy that learns on a CPU
(`trainer/models/robot`): its image is 4 tokens, and it loads without Stoker (trust_remote_code), as the folder carries its code.
"""

from __future__ import annotations

import argparse
import importlib
import os
from functools import partial
from pathlib import Path
from typing import Any

from stoker_proto.errors import ConfigError, StokerError
from trainer.models.robot.building import TOWERS, RobotSizes
from trainer.models.tiny_tokenizer import (
    ASSISTANT,
    BOS,
    EOS,
    IMAGE,
    OPENVLA_PAD,
    PAD,
    UNK,
    USER,
    build_openvla_tokenizer,
    build_robot_tokenizer,
    build_tokenizer,
)

TOKENS_PER_SIDE = 4  # an image is 4 x 4 tokens
MERGE = 2  # idefics3 merges 2 x 2 patches into one token
VLMS: dict[str, tuple[str, ...]] = {
    "smolvlm": (),
    "paligemma": (),
    "internvl": ("<img>", "</img>"),
    "qwen2_5_vl": ("<|vision_start|>", "<|vision_end|>"),
    "qwen3_vl": ("<|vision_start|>", "<|vision_end|>"),
}
"""Families of `tiny_vlms` -> tokens that stand around their images."""
_IDEFICS_TOKENS = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")

# The template of `data.dialogue.template: stoker`, so that both ways of writing a row give the same tokens.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['content'] is string %}{% set text = message['content'] %}{% else %}"
    "{% set pieces = namespace(text='') %}"
    "{% for part in message['content'] %}"
    "{% set pieces.text = pieces.text + (' ' if pieces.text else '') %}"
    "{% set pieces.text = pieces.text + ('<image>' if part['type'] == 'image' else part['text']) %}"
    "{% endfor %}{% set text = pieces.text %}{% endif %}"
    "{% if message['role'] == 'assistant' %}<|Assistant|>{% generation %} {{ text }}{{ eos_token }}{% endgeneration %}"
    "{% elif message['role'] == 'user' %}<|User|> {{ text }} "
    "{% else %}{{ text }} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)


def build_tiny(family: str, out: Path, *, image_size: int = 64, seed: int = 0, robot: RobotSizes | None = None) -> int:
    """Write a model of the family into the folder `out`; returns its number of parameters. The same seed makes the same weights.

    image_size: height and width in pixels that the image processor makes. robot: sizes of the family `robot`.
    Raises ConfigError.
    """

    def _robot(tokenizer: Any, image_size: int) -> tuple[Any, Any]:
        found: tuple[Any, Any] = importlib.import_module("trainer.models.robot.building").build_robot(
            tokenizer, image_size, robot or RobotSizes()
        )
        return found

    builders = {"llava": _llava, "idefics3": _idefics3, "openvla": _openvla, "robot": _robot, "causal": _causal}
    builders |= dict.fromkeys(VLMS, partial(_vlm, family))
    if family not in builders:
        raise ConfigError(f"--family {family!r}: choose one of {', '.join(builders)}")
    step = TOKENS_PER_SIDE * (1 if family in ("llava", "openvla", "paligemma", "robot", "causal") else MERGE)
    if family != "causal" and (image_size < step or image_size % step):
        raise ConfigError(
            f"--image-size {image_size}: {family} cuts it into {step} x {step} patches, take a multiple of {step}"
        )
    extra = _IDEFICS_TOKENS if family in ("idefics3", "smolvlm") else VLMS.get(family, ())
    tokenizer = _openvla_tokenizer() if family == "openvla" else _tokenizer(extra, has_numbers=family == "robot")
    torch = importlib.import_module("torch")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = builders[family](tokenizer, image_size)
    out.mkdir(parents=True, exist_ok=True)
    if model.can_generate():
        model.generation_config.update(
            bos_token_id=_id(tokenizer, BOS), eos_token_id=_id(tokenizer, EOS), pad_token_id=tokenizer.pad_token_id
        )
    model.save_pretrained(out)
    (processor or tokenizer).save_pretrained(out)
    return sum(parameter.numel() for parameter in model.parameters())


def _transformers(submodule: str = "") -> Any:
    """The transformers module, imported on first use so that `--help` answers at once. Untyped, as it is typed only in parts."""
    return importlib.import_module(f"transformers{submodule}")


def _tokenizer(extra_tokens: tuple[str, ...], *, has_numbers: bool = False) -> Any:
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=build_robot_tokenizer() if has_numbers else build_tokenizer(extra_tokens),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="right",
        model_max_length=2048,
        extra_special_tokens={"image_token": IMAGE, "user_token": USER, "assistant_token": ASSISTANT},
        chat_template=CHAT_TEMPLATE,
    )


def _openvla_tokenizer() -> Any:
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=build_openvla_tokenizer(),
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=OPENVLA_PAD,
        padding_side="right",
        model_max_length=2048,
    )


def _text_config(tokenizer: Any) -> Any:
    return _transformers().LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=2048,
        bos_token_id=_id(tokenizer, BOS),
        eos_token_id=_id(tokenizer, EOS),
        pad_token_id=_id(tokenizer, PAD),
    )


def _vision_options(image_size: int, patch_size: int) -> dict[str, int]:
    return {
        "image_size": image_size,
        "patch_size": patch_size,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }


def _causal(tokenizer: Any, image_size: int) -> tuple[Any, None]:
    return _transformers().LlamaForCausalLM(_text_config(tokenizer)), None


def _llava(tokenizer: Any, image_size: int) -> tuple[Any, Any]:
    library, images = _transformers(), _transformers(".models.clip.image_processing_pil_clip")
    patch_size = image_size // TOKENS_PER_SIDE
    config = library.LlavaConfig(
        vision_config=library.CLIPVisionConfig(**_vision_options(image_size, patch_size)),
        text_config=_text_config(tokenizer),
        image_token_index=_id(tokenizer, IMAGE),
        image_seq_length=TOKENS_PER_SIDE**2,
        vision_feature_layer=-1,
    )
    processor = library.LlavaProcessor(
        image_processor=images.CLIPImageProcessorPil(
            size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
        ),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token; "default" drops it again
        chat_template=CHAT_TEMPLATE,
    )
    return library.LlavaForConditionalGeneration(config), processor


def _idefics3(tokenizer: Any, image_size: int) -> tuple[Any, Any]:
    library, images = _transformers(), _transformers(".models.idefics3.image_processing_pil_idefics3")
    patch_size = image_size // (TOKENS_PER_SIDE * MERGE)
    config = library.Idefics3Config(
        vision_config=_vision_options(image_size, patch_size),
        text_config=_text_config(tokenizer),
        image_token_id=_id(tokenizer, IMAGE),
        scale_factor=MERGE,
    )
    processor = library.Idefics3Processor(
        image_processor=images.Idefics3ImageProcessorPil(
            size={"longest_edge": image_size}, max_image_size={"longest_edge": image_size}, do_image_splitting=False
        ),
        tokenizer=tokenizer,
        image_seq_len=TOKENS_PER_SIDE**2,
        chat_template=CHAT_TEMPLATE,
    )
    return library.Idefics3ForConditionalGeneration(config), processor


def _vlm(family: str, tokenizer: Any, image_size: int) -> tuple[Any, Any]:
    found: tuple[Any, Any] = importlib.import_module("trainer.models.tiny_vlms").build_vlm(
        family, tokenizer, _text_config(tokenizer), image_size, TOKENS_PER_SIDE
    )
    return found


def _openvla(tokenizer: Any, image_size: int) -> tuple[Any, Any]:
    found: tuple[Any, Any] = importlib.import_module("trainer.models.openvla.tiny").build_openvla(
        tokenizer, image_size, TOKENS_PER_SIDE
    )
    return found


def _id(tokenizer: Any, token: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(token))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.models.tiny",
        description="Write a small random model (about a million parameters) with its tokenizer and image processor, "
        "as a folder that transformers' Auto classes load. Nothing is downloaded. For demos and tests.",
        epilog="example: python -m trainer.models.tiny --family llava --out models/tiny-llava, "
        "then set model.base_model_path: models/tiny-llava",
    )
    families = (
        "llava: CLIP tower + Llama; idefics3: SmolVLM's kind; openvla: two towers + Llama; causal: a text-only Llama; "
        f"{', '.join(VLMS)}: the models of these names; robot: a policy that learns on a CPU"
    )
    parser.add_argument(
        "--family", required=True, choices=("llava", "idefics3", "openvla", "robot", "causal", *VLMS), help=families
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write; made if missing")
    size_help = "images become PIXELS x PIXELS, always 16 tokens; a multiple of 4 (idefics3: of 8), default %(default)s"
    parser.add_argument("--image-size", type=int, default=64, metavar="PIXELS", help=size_help)
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default %(default)s)")
    _add_robot_sizes(parser)
    options = parser.parse_args(arguments)
    sizes = RobotSizes(
        num_views=options.num_views, state_width=options.state_width,
        auxiliary_width=options.auxiliary_width, answer_tokens=options.answer_tokens,
        word_window=options.word_window, towers=options.towers,
    )  # fmt: skip
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # never wait for a network
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports deepspeed, which would report on accelerators
    _transformers(".utils.logging").disable_progress_bar()
    try:
        parameters = build_tiny(
            options.family, options.out, image_size=options.image_size, seed=options.seed, robot=sizes
        )
    except (StokerError, OSError) as error:
        print(f"error: {error}")
        return 2
    print(f"{options.out}: {options.family}, {parameters:,} parameters")
    return 0


def _add_robot_sizes(parser: argparse.ArgumentParser) -> None:
    group, usual = parser.add_argument_group("of the family robot, as in its data"), RobotSizes()
    group.add_argument(
        "--num-views", type=int, default=usual.num_views, metavar="V", help="images of a sample (default %(default)s)"
    )
    group.add_argument(
        "--state-width",
        type=int,
        default=usual.state_width,
        metavar="S",
        help="numbers of the state (default %(default)s)",
    )
    group.add_argument(
        "--auxiliary-width", type=int, default=usual.auxiliary_width, metavar="A",
        help="numbers of data.options.auxiliary_keys, two positions first (default %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--answer-tokens", type=int, default=usual.answer_tokens, metavar="N",
        help="most tokens of an answer, its end included (default %(default)s: one action of 7 numbers)",
    )  # fmt: skip
    group.add_argument(
        "--word-window", type=int, default=usual.word_window, metavar="N",
        help="tokens read together (odd), where the order of words alone tells tasks apart; 0: none (default %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--towers", choices=TOWERS, default=usual.towers,
        help="numbers of the convolutions; auto: bfloat16 where this machine has instructions for it (default %(default)s)",
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
