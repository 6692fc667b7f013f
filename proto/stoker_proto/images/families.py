"""From a model's folder to its ImageSpec, one function per family of vision-language models.

The values come from config.json and the processor's JSON. Missing values have the defaults of the image processor's class
(transformers `models/{clip,siglip,llava,idefics3,qwen2_vl,got_ocr2}/image_processing_pil_*.py`). Idefics3, SmolVLM and InternVL
can cut an image into tiles; Stoker never does: an image is one square, as with `do_image_splitting=False` and
`crop_to_patches=False`. Where such a model's `size` is larger than its
`max_image_size`, its processor scales up first and then down, and so does Stoker. That takes 10-20 ms an image; with both set to
the same value in the model's processor_config.json it takes 0.5 ms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer

from stoker_proto.errors import ConfigError
from stoker_proto.images.geometry import Step
from stoker_proto.images.openvla import openvla_spec
from stoker_proto.images.padding import mean_colour
from stoker_proto.images.spec import ImageSpec, Resample
from stoker_proto.model_folder import ModelFolder

_RESAMPLE: dict[int, Resample] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling
_CLIP = {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_CLIP_COLOURS = {name: _CLIP[name] for name in ("resample", "image_mean", "image_std")}
_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_TILED = {"size": {"longest_edge": 1456}, "max_image_size": {"longest_edge": 364}, "resample": 1, **_HALF}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": _CLIP,
    "LlavaImageProcessor": {**_CLIP, "do_pad": False},
    "SiglipImageProcessor": {"size": {"height": 224, "width": 224}, "resample": 3, **_HALF},
    "Idefics3ImageProcessor": _TILED,
    "SmolVLMImageProcessor": _TILED,
    "GotOcr2ImageProcessor": {"size": {"height": 384, "width": 384}, **_CLIP_COLOURS},
    "Qwen2VLImageProcessor": {
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
        "patch_size": 14,
        "merge_size": 2,
        **_CLIP_COLOURS,
    },
    "PrismaticImageProcessor": {},  # has its own names of everything, see `openvla`
}


def read_image_spec(folder: ModelFolder, tokenizer: Tokenizer, size: tuple[int, int] | None = None) -> ImageSpec | None:
    """The model's ImageSpec; None for a model that takes text only. Raises ConfigError for an unknown family or value.

    size: `data.image.size`, for models that take any.
    """
    family = str(folder.config.get("model_type"))
    if family not in FAMILIES:
        if "vision_config" in folder.config:
            raise ConfigError(
                f"model.base_model_path is {str(folder.path)!r}, a model of type {family!r} that sees images: known are "
                f"{', '.join(FAMILIES)}; take one of these, or add the family to stoker_proto/images/families.py"
            )
        return None
    spec = FAMILIES[family].read(_Reader(folder, tokenizer, size))
    if size is not None and (spec.height, spec.width) != size:
        raise ConfigError(
            f"data.image.size is {list(size)}, but the model in {folder.path} takes images of {spec.height} x {spec.width} only: "
            "leave the key out"
        )
    return spec


class _Reader:
    """The values in one model's folder, with the defaults of its image processor."""

    def __init__(self, folder: ModelFolder, tokenizer: Tokenizer, size: tuple[int, int] | None) -> None:
        self.folder, self.tokenizer, self.size = folder, tokenizer, size
        self.processor, image = folder.processor_configs()
        named = str(image.get("image_processor_type", image.get("feature_extractor_type", "")))
        self.kind = named.removesuffix("Pil").removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
        if self.kind not in _DEFAULTS:
            raise self.error(f"its image processor {named!r} is not known; known are {', '.join(_DEFAULTS)}")
        given = {name: value for name, value in image.items() if value is not None}
        self.image = {"do_resize": True, "do_rescale": True, "do_normalize": True, **_DEFAULTS[self.kind], **given}
        self.vision: dict[str, Any] = folder.config.get("vision_config") or {}

    def error(self, reason: str) -> ConfigError:
        return ConfigError(f"model.base_model_path is {str(self.folder.path)!r}: {reason}")

    def token_of(self, key: str) -> str:
        """The token whose id config.json gives under the key."""
        token = self.tokenizer.id_to_token(int(self.folder.config.get(key, -1))) if key in self.folder.config else None
        if token is None:
            raise self.error(
                f"config.json gives {self.folder.config.get(key)} as {key}, which its tokenizer does not have"
            )
        return token

    def spec(self, family: str, steps: list[Step], num_tokens: int, **more: Any) -> ImageSpec:
        """The ImageSpec, from values that all families share. The last step is `fixed` or `crop` and so defines the size."""
        token_id = self.folder.config.get("image_token_id", self.folder.config.get("image_token_index"))
        token = None if token_id is None else self.tokenizer.id_to_token(int(token_id))
        if token_id is None or token is None:
            raise self.error(f"config.json gives {token_id} as the image token's id, which its tokenizer does not have")
        height, width = steps[-1][1:]
        self._check_tower(height, width)
        image = self.image
        if image.get("do_pad") and image.get("pad_size"):  # transformers pads what is normalised, at the end
            raise self.error(f"do_pad to {image['pad_size']} is not known; set do_pad to false in the processor's JSON")
        resample = _RESAMPLE.get(image["resample"])
        if resample is None:
            raise self.error(
                f"resample {image['resample']} is not known; known are 1 (lanczos), 2 (bilinear), 3 (bicubic)"
            )
        normalise = image["do_normalize"]
        return ImageSpec(
            family=family,
            height=height,
            width=width,
            steps=tuple(steps),
            resample=resample,
            rescale=float(image.get("rescale_factor", 1 / 255)) if image["do_rescale"] else 1.0,
            mean=_triple(image["image_mean"]) if normalise else (0.0, 0.0, 0.0),
            std=_triple(image["image_std"]) if normalise else (1.0, 1.0, 1.0),
            num_tokens=num_tokens,
            token=token,
            token_id=int(token_id),
            **more,
        )

    def _check_tower(self, height: int, width: int) -> None:
        size = self.vision.get("image_size")
        if size is None:
            return
        expected = [size, size] if isinstance(size, int) else list(size)
        if expected != [height, width]:
            raise self.error(
                f"its processor makes images of {height} x {width}, its vision tower takes {expected[0]} x {expected[1]}; "
                "make size (and crop_size) of the processor's JSON the same as vision_config.image_size of config.json"
            )

    def size_steps(self) -> list[Step]:
        """The steps of a processor that scales to `size` and may crop the centre."""
        image = self.image
        size = {"shortest_edge": image["size"]} if isinstance(image["size"], int) else image["size"]
        steps: list[Step] = []
        if image["do_resize"]:
            if set(size) == {"height", "width"}:
                steps.append(("fixed", int(size["height"]), int(size["width"])))
            elif set(size) == {"shortest_edge"}:
                steps.append(("shortest", int(size["shortest_edge"]), 0))
            else:
                raise self.error(f"size {size} is not known; known are height and width, or shortest_edge")
        if image.get("do_center_crop"):
            crop = image["crop_size"]
            height, width = (crop, crop) if isinstance(crop, int) else (int(crop["height"]), int(crop["width"]))
            if not steps or min(step for step in steps[-1][1:] if step) < max(height, width):
                raise self.error(
                    f"crop_size {height} x {width} is larger than size {size}: parts of images would be empty"
                )
            steps.append(("crop", height, width))
        if not steps or steps[-1][0] == "shortest":
            raise self.error(
                "its images would differ in shape; set do_center_crop and crop_size in the processor's JSON"
            )
        return steps

    def patches(self, height: int, width: int, patch_size: Any) -> int:
        if not isinstance(patch_size, int):
            raise self.error("patch_size is given neither by processor_config.json nor by vision_config of config.json")
        return (height // patch_size) * (width // patch_size)


def _llava(reader: _Reader) -> ImageSpec:
    config, processor = reader.folder.config, reader.processor
    if reader.kind not in ("CLIPImageProcessor", "LlavaImageProcessor", "SiglipImageProcessor"):
        raise reader.error(f"image processor {reader.kind} in a LLaVA model is not known")
    steps = reader.size_steps()
    more: dict[str, Any] = {}
    if reader.image.get("do_pad"):
        if reader.kind != "LlavaImageProcessor":
            raise reader.error(f"do_pad with {reader.kind} is not known; set it to false in the processor's JSON")
        steps.insert(0, ("square", 0, 0))
        more["pad_colour"] = mean_colour(reader.image["image_mean"])
    patch_size = processor.get("patch_size") or reader.vision.get("patch_size")
    tokens = reader.patches(*steps[-1][1:], patch_size)
    has_class_token = reader.vision.get("model_type", "clip_vision_model") == "clip_vision_model"
    tokens += int(processor.get("num_additional_image_tokens", int(has_class_token)))
    strategy = processor.get("vision_feature_select_strategy") or config.get(
        "vision_feature_select_strategy", "default"
    )
    return reader.spec("llava", steps, tokens - (strategy == "default"), **more)


def _idefics3(reader: _Reader) -> ImageSpec:
    if reader.kind not in ("Idefics3ImageProcessor", "SmolVLMImageProcessor"):
        raise reader.error(f"image processor {reader.kind} in an Idefics3 or SmolVLM model is not known")
    size, side = reader.image["size"], int(reader.image["max_image_size"]["longest_edge"])
    steps: list[Step] = [("fixed", side, side)]
    if reader.image["do_resize"]:
        if "longest_edge" in size:
            steps.insert(0, ("longest", int(size["longest_edge"]), 0))
        else:
            steps.insert(0, ("fixed", int(size["height"]), int(size["width"])))
    tokens = reader.processor.get("image_seq_len")
    if tokens is None:
        scale = int(reader.folder.config.get("scale_factor", 2))
        tokens = reader.patches(side, side, reader.vision.get("patch_size")) // scale**2
    names = reader.folder.special_tokens()
    fake = names.get("fake_image_token", "<fake_token_around_image>")
    whole = names.get("global_image_token", "<global-img>")
    return reader.spec("idefics3", steps, int(tokens), before=fake + whole, after=fake)


def _paligemma(reader: _Reader) -> ImageSpec:
    if reader.kind != "SiglipImageProcessor":
        raise reader.error(f"image processor {reader.kind} in a PaliGemma model is not known")
    steps = reader.size_steps()
    tokens = reader.image.get("image_seq_length") or reader.vision.get("num_image_tokens")
    if tokens is None:
        tokens = reader.patches(*steps[-1][1:], reader.vision.get("patch_size"))
    return reader.spec("paligemma", steps, int(tokens), before_bos=True)


def _openvla(reader: _Reader) -> ImageSpec:
    if reader.kind != "PrismaticImageProcessor":
        raise reader.error(f"image processor {reader.kind} in an OpenVLA model is not known")
    return openvla_spec(reader.folder.config, reader.image, reader.error)


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = (values, values, values) if isinstance(values, float | int) else values
    return float(red), float(green), float(blue)


def _internvl(reader: _Reader) -> ImageSpec:
    if reader.kind != "GotOcr2ImageProcessor":
        raise reader.error(f"image processor {reader.kind} in an InternVL model is not known")
    steps, config = reader.size_steps(), reader.folder.config
    tokens = reader.processor.get("image_seq_length") or config.get("image_seq_length")
    if tokens is None:
        patch = reader.vision.get("patch_size")
        patches = reader.patches(*steps[-1][1:], patch[0] if isinstance(patch, list) else patch)
        tokens = patches * float(config.get("downsample_ratio", 0.5)) ** 2
    names = reader.folder.special_tokens()
    before, after = names.get("start_image_token", "<img>"), names.get("end_image_token", "</img>")
    return reader.spec("internvl", steps, int(tokens), before=before, after=after)


def _qwen_vl(reader: _Reader) -> ImageSpec:
    """Its own processor makes each image another size (`smart_resize`); Stoker makes all of them `data.image.size`."""
    if reader.kind != "Qwen2VLImageProcessor":
        raise reader.error(f"image processor {reader.kind} in a Qwen-VL model is not known")
    side = int(reader.image["patch_size"]) * int(reader.image["merge_size"])
    least, most = (
        _pixel_limit(reader, *names) for names in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
    )
    if reader.size is None:
        raise reader.error(
            f"a Qwen-VL model takes images of any size: set data.image.size to [height, width], both multiples of {side} pixels; "
            f"for frames of 256 x 256 its own processor would make [{round(256 / side) * side}, {round(256 / side) * side}]"
        )
    height, width = reader.size
    if height % side or width % side or not least <= height * width <= most:
        raise reader.error(
            f"data.image.size is [{height}, {width}]: this model takes multiples of {side}, and {least} to {most} pixels in all"
        )
    before, after = (reader.token_of(f"vision_{name}_token_id") for name in ("start", "end"))
    tokens = (height // side) * (width // side)
    return reader.spec("qwen_vl", [("fixed", height, width)], tokens, before=before, after=after)


def _pixel_limit(reader: _Reader, name: str, edge: str) -> int:
    """Qwen2.5-VL's files name it `min_pixels`, some of them in `size`; those of Qwen3-VL `shortest_edge` in `size`."""
    image, size = reader.image, reader.image["size"] if isinstance(reader.image["size"], dict) else {}
    found = next((value for value in (image.get(name), size.get(edge), size.get(name)) if value is not None), None)
    if found is None:
        raise reader.error(
            f"its processor's JSON has no {name}, and its size {image['size']} neither {name} nor {edge}"
        )
    return int(found)


Layout = Literal["batch", "one_row", "placed", "patches"]
"""In which shape a model's forward takes images: see `trainer.models.families`."""


@dataclass(frozen=True, slots=True)
class ImageFamily:
    """What loaders and trainer need to know of the models of one `model_type`."""

    read: Callable[[_Reader], ImageSpec]
    """Reads the ImageSpec from the model's folder."""
    layout: Layout
    marks: Literal["", "image_places", "suffix"] = ""
    """What forward needs to know of each token: whether an image is there; whether it belongs to the learned end of the row."""
    causal: bool = True
    """Whether each token of a row attends only to earlier ones, so that padding at the end needs no mask."""


# Qwen-VL is causal, but it counts positions from the mask.
FAMILIES: dict[str, ImageFamily] = {
    "llava": ImageFamily(_llava, "batch"),
    "idefics3": ImageFamily(_idefics3, "one_row"),
    "smolvlm": ImageFamily(_idefics3, "one_row"),
    "paligemma": ImageFamily(_paligemma, "batch", "suffix", causal=False),
    "internvl": ImageFamily(_internvl, "batch"),
    "qwen2_5_vl": ImageFamily(_qwen_vl, "patches", "image_places", causal=False),
    "qwen3_vl": ImageFamily(_qwen_vl, "patches", "image_places", causal=False),
    "openvla": ImageFamily(_openvla, "placed"),
    "stoker_robot": ImageFamily(_llava, "batch", causal=False),  # our small policy: it has LLaVA's processor
}
"""`model_type` of config.json -> its family: the one table that loaders and trainer read."""
