"""Padding to a square: whether a model's processor does it, whether `data.image.pad_to_square` adds it, and the processor's JSON
that makes transformers do the same with the export.

    model                                     pad_to_square   trained with         exported processor
    LlavaImageProcessor, do_pad: true         null, true      its own padding      as it was
    LLaVA, do_pad: false or no such key       true            padding, mean colour LlavaImageProcessor, do_pad: true
    another family                            true            padding, black       cannot pad: `unpadded_by` says so
    any whose processor pads                  false           refused

LLaVA's processor pads with the mean colour (transformers `models/llava/image_processing_pil_llava.py`, pad_to_square), so
padding that it will do has that colour.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stoker_proto.errors import ConfigError
from stoker_proto.images.spec import ImageSpec
from stoker_proto.model_folder import ModelFolder

_PADS = "LlavaImageProcessor"
_WRITABLE = ("llava",)
"""Families of ImageSpec whose processor transformers can make pad to a square."""


def pads(spec: ImageSpec) -> bool:
    """Whether frames are padded to a square before anything else."""
    return bool(spec.steps) and spec.steps[0][0] in ("square", "letterbox")


def mean_colour(mean: Any) -> tuple[int, int, int]:
    """RGB 0-255 with which LLaVA's processor pads."""
    red, green, blue = (mean, mean, mean) if isinstance(mean, float | int) else mean
    return int(red * 255), int(green * 255), int(blue * 255)


def choose_padding(spec: ImageSpec, wanted: bool | None, folder: ModelFolder) -> ImageSpec:
    """The spec with the padding of `data.image.pad_to_square`. Raises ConfigError where the model says something else."""
    if wanted is False and pads(spec):
        raise ConfigError(
            f"data.image.pad_to_square is false, but the image processor in {folder.path} pads frames to a square: leave the key "
            "out, or turn the padding off in the processor's JSON (LLaVA: do_pad; OpenVLA: image_resize_strategy)"
        )
    if wanted is None and not pads(spec):
        _check_aspect_ratio(folder)
    if not wanted or pads(spec):
        return spec
    colour = mean_colour(spec.mean) if _can_write(spec) else spec.pad_colour
    return replace(spec, steps=(("square", 0, 0), *spec.steps), pad_colour=colour)


def unpadded_by(spec: ImageSpec | None, folder: ModelFolder) -> str | None:
    """A sentence where frames are trained padded and the exported processor of transformers cannot do it; else None."""
    if spec is None or not pads(spec) or _can_write(spec) or _own_padding(folder):
        return None
    return (
        "data.image.pad_to_square pads frames with black, which transformers' processor of this model cannot do: the policy and "
        "the policy server pad, a program that uses AutoProcessor has to pad frames to a square itself"
    )


def padding_processor(spec: ImageSpec | None, image: dict[str, Any]) -> dict[str, Any]:
    """The JSON of an image processor that pads as the spec does; `image` itself where it already does or cannot.

    image: of the base model. Values that it leaves to the defaults of its class are written out.
    """
    if spec is None or not pads(spec) or not _can_write(spec):
        return image
    if image.get("do_pad") and str(image.get("image_processor_type", "")).startswith(_PADS):
        return image
    kinds = {step[0]: step[1:] for step in spec.steps}
    size: dict[str, int] = {}
    if "shortest" in kinds:
        size = {"shortest_edge": kinds["shortest"][0]}
    elif "fixed" in kinds:
        size = {"height": kinds["fixed"][0], "width": kinds["fixed"][1]}
    crops = "crop" in kinds
    written = {
        "image_processor_type": _PADS,
        "do_pad": True,
        "do_resize": bool(size),
        "do_center_crop": crops,
        "resample": {"lanczos": 1, "bilinear": 2, "bicubic": 3}[spec.resample],
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        **({"size": size} if size else {}),
        **({"crop_size": dict(zip(("height", "width"), kinds["crop"], strict=True))} if crops else {}),
    }
    return {**{name: value for name, value in image.items() if name != "feature_extractor_type"}, **written}


def _can_write(spec: ImageSpec) -> bool:
    """Whether transformers has a processor that pads for this model."""
    return spec.family in _WRITABLE


def _own_padding(folder: ModelFolder) -> bool:
    """Whether the processor of an OpenVLA model pads by itself."""
    _, image = folder.processor_configs()
    return bool(
        folder.config.get("model_type") == "openvla" and image.get("image_resize_strategy", "letterbox") == "letterbox"
    )


def _check_aspect_ratio(folder: ModelFolder) -> None:
    """Refuse a model that was trained on padded images and whose processor does not pad: transformers ignores that key."""
    ratio = folder.config.get("image_aspect_ratio")
    if ratio is None or ratio == "square" or folder.config.get("model_type") != "llava":
        return
    if ratio == "pad":
        raise ConfigError(
            f"{folder.path / 'config.json'}: image_aspect_ratio is 'pad', so the model was trained on frames padded to a square, "
            "but its image processor does not pad: set data.image.pad_to_square to true (the export's processor pads, too), or "
            "to false to train as that processor does"
        )
    raise ConfigError(
        f"{folder.path / 'config.json'}: image_aspect_ratio is {ratio!r}, which cuts an image into tiles; Stoker makes one image "
        "of a frame: set data.image.pad_to_square to true or false to say how"
    )
