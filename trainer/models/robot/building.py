"""A random `RobotPolicy` and its processor, for `trainer.models.tiny --family robot`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stoker_proto.errors import ConfigError
from trainer.models.tiny_tokenizer import ASSISTANT, IMAGE, NUM_NUMBERS


@dataclass(frozen=True, slots=True, kw_only=True)
class RobotSizes:
    """What a `RobotPolicy` has to agree with its data about."""

    num_views: int = 2
    """V: images of a sample (`data.options.views`)."""
    state_width: int = 9
    """S: numbers of the state (`data.state: text`); 0: none."""
    auxiliary_width: int = 8
    """A: numbers that training predicts beside the actions (`data.options.auxiliary_keys`); 0: none."""
    answer_tokens: int = 8
    """Most tokens of an answer, the end token included: actions of a chunk x numbers of an action + 1."""
    word_window: int = 0
    """Tokens of the instruction that are read together (odd), where the order of words tells tasks apart; 0: one by one."""
    towers: str = "auto"
    """Numbers that convolutions compute in: one of TOWERS. auto: bfloat16 where this machine has instructions for it. The model
    keeps the choice, so that it computes alike everywhere."""


TOWERS = ("auto", "float32", "bfloat16")


def is_quick_in_bfloat16() -> bool:
    """Whether this machine has a GPU, or a CPU with instructions for bfloat16.

    Elsewhere PyTorch emulates it: with AVX2 alone, the convolutions of a step took nine times as long as in float32."""
    torch = importlib.import_module("torch")
    capabilities: Mapping[str, Any] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # old versions lack it: float32 is safe
    return bool(torch.cuda.is_available() or capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def build_robot(tokenizer: Any, image_size: int, sizes: RobotSizes) -> tuple[Any, Any]:
    """(model, processor). Raises ConfigError for sizes that cannot be."""
    if sizes.num_views < 1 or sizes.answer_tokens < 1 or min(sizes.state_width, sizes.auxiliary_width) < 0:
        raise ConfigError(f"{sizes}: at least one view and one answer token are needed, and no width is below 0")
    if sizes.auxiliary_width % 2 or 0 < sizes.auxiliary_width < 6:
        raise ConfigError(
            f"--auxiliary-width {sizes.auxiliary_width}: the first six numbers are two positions in metres; take 0, or 6 and more"
        )
    if sizes.word_window < 0 or (sizes.word_window and sizes.word_window % 2 == 0):
        raise ConfigError(f"--word-window {sizes.word_window}: an odd number, or 0 for words that are read one by one")
    if sizes.towers not in TOWERS:
        raise ConfigError(f"--towers {sizes.towers!r}: choose one of {', '.join(TOWERS)}")
    in_bfloat16 = is_quick_in_bfloat16() if sizes.towers == "auto" else sizes.towers == "bfloat16"
    library = importlib.import_module("transformers")
    images = importlib.import_module("transformers.models.clip.image_processing_pil_clip")
    modeling = importlib.import_module("trainer.models.robot.modeling")

    def id_of(token: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(token))

    numbers = [tokenizer(f" {number}", add_special_tokens=False)["input_ids"] for number in range(NUM_NUMBERS)]
    if any(len(ids) != 1 for ids in numbers):
        raise ConfigError("the tokenizer does not have one token for each number of a state; build it with numbers")
    config = modeling.RobotConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        word_window=sizes.word_window,
        image_size=image_size,
        num_views=sizes.num_views,
        state_width=sizes.state_width,
        auxiliary_width=sizes.auxiliary_width,
        answer_tokens=sizes.answer_tokens,
        image_token_id=id_of(IMAGE),
        assistant_token_id=id_of(ASSISTANT),
        number_ids=tuple(ids[0] for ids in numbers),
        half_precision_towers=in_bfloat16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    side = {"height": image_size, "width": image_size}
    processor = library.LlavaProcessor(
        image_processor=images.CLIPImageProcessorPil(
            size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        tokenizer=tokenizer,
        patch_size=image_size // 2,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=tokenizer.chat_template,
    )
    return modeling.RobotPolicy(config), processor
