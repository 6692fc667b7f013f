"""OpenVLA's images: config.json and preprocessor_config.json -> ImageSpec.

    {"image_processor_type": "PrismaticImageProcessor", "image_resize_strategy": "resize-naive",
     "input_sizes": [[3, 224, 224], [3, 224, 224]], "interpolations": ["bicubic", "bicubic"],
     "means": [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5]], "stds": [[0.229, 0.224, 0.225], [0.5, 0.5, 0.5]]}

One image of 224 x 224 travels; the device normalises it twice, for DINOv2 and for SigLIP, into six channels. Its 256 places
stand behind the begin-of-sequence token, whatever the template of the dialogue.
Source: openvla `prismatic/extern/hf/processing_prismatic.py`; torchvision `transforms/functional.py` (resize, center_crop).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from stoker_proto.errors import ConfigError
from stoker_proto.images.geometry import Step
from stoker_proto.images.spec import ImageSpec, Resample

IMAGE_TOKEN_ID = 1 << 30
"""The place of a patch in a row. OpenVLA has no token for it; no vocabulary is so large that a token could have this id."""
IMAGE_TOKEN = "<image>"
_RESAMPLE: dict[str, Resample] = {"bilinear": "bilinear", "bicubic": "bicubic", "lanczos": "lanczos"}


def openvla_spec(config: Mapping[str, Any], image: Mapping[str, Any], error: Callable[[str], ConfigError]) -> ImageSpec:
    """config: of config.json; image: of preprocessor_config.json; error: makes the ConfigError that is raised."""
    sizes = [tuple(size)[1:] for size in image.get("input_sizes") or []]
    means, stds = image.get("means") or [], image.get("stds") or []
    methods = image.get("interpolations") or []
    if not len(sizes) == len(means) == len(stds) == len(methods) == 2:
        raise error(
            "its image processor has not two input_sizes, interpolations, means and stds: two towers are expected"
        )
    height, width = sizes[0]
    towers = list(config.get("image_sizes") or [224, 224])
    if height != width or sizes[0] != sizes[1] or towers != [height, height]:
        raise error(
            f"its processor makes images of {sizes[0]} and {sizes[1]}, its vision towers take {towers}: all must be one square; "
            "make input_sizes of preprocessor_config.json the same as image_sizes of config.json"
        )
    if methods[0] != methods[1] or methods[0] not in _RESAMPLE:
        raise error(f"interpolations {methods} are not known; known are two times one of {', '.join(_RESAMPLE)}")
    side = height // _patch_size(config, error)
    return ImageSpec(
        family="openvla",
        height=height,
        width=width,
        steps=_steps(str(image.get("image_resize_strategy", "letterbox")), height, error),
        resample=_RESAMPLE[methods[0]],
        pad_colour=tuple(int(value * 255) for value in means[-1]),  # type: ignore[arg-type]  # the last tower's, as published
        rescale=1 / 255,
        mean=_triple(means[0]),
        std=_triple(stds[0]),
        second_mean=_triple(means[1]),
        second_std=_triple(stds[1]),
        num_tokens=side * side,
        token=IMAGE_TOKEN,
        token_id=IMAGE_TOKEN_ID,
        after_bos=True,
    )


def _steps(strategy: str, side: int, error: Callable[[str], ConfigError]) -> tuple[Step, ...]:
    crop: tuple[Step, ...] = (("shortest", side, 0), ("centre", side, side))
    known: dict[str, tuple[Step, ...]] = {
        "resize-naive": (("fixed", side, side),),
        "resize-crop": crop,
        "letterbox": (("letterbox", 0, 0), *crop),
    }
    if strategy not in known:
        raise error(f"image_resize_strategy {strategy!r} is not known; known are {', '.join(known)}")
    return known[strategy]


def _patch_size(config: Mapping[str, Any], error: Callable[[str], ConfigError]) -> int:
    """Of `vision_towers`, or of timm's name of the first tower: vit_large_patch14_reg4_dinov2."""
    towers = config.get("vision_towers")
    if towers:
        return int(towers[0]["patch_size"])
    name = str((config.get("timm_model_ids") or [""])[0])
    found = re.search(r"patch(\d+)", name)
    if found is None:
        raise error(f"timm_model_ids of config.json names {name!r}, which does not say the size of its patches")
    return int(found[1])


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)
