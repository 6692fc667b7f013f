"""What one model needs of its images, as plain values: size, resampling, normalisation, tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

from stoker_proto.errors import DataError
from stoker_proto.images.geometry import Step

Resample = Literal["bilinear", "bicubic", "lanczos"]

_LATER = frozenset({"after_bos", "second_mean", "second_std"})
"""Fields that came later: models were exported without, and their JSON must stay as it was."""
MAX_EDGE = 1 << 14
"""Largest height and width of a model's image, in pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSpec:
    """The model's input: uint8[height, width, 3], which the device turns into (pixel * rescale - mean) / std.

    With `second_mean` and `second_std` the device normalises the image a second time, into three more channels after the first.
    """

    family: str
    """llava, idefics3, paligemma, internvl, qwen_vl or openvla."""
    height: int
    width: int
    steps: tuple[Step, ...]
    """How a frame of any size becomes the model's size, see `stoker_proto.images.geometry`."""
    resample: Resample
    """The filter; antialiased as in Pillow."""
    pad_colour: tuple[int, int, int] = (0, 0, 0)
    """RGB of the steps `square` and `letterbox`."""
    rescale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_tokens: int
    """How many times `token` stands for one image: once per feature of the vision tower."""
    token: str
    """The placeholder that the model replaces by one feature, e.g. "<image>"."""
    token_id: int
    before: str = ""
    """Text before an image's placeholders."""
    after: str = ""
    """Text after them."""
    before_bos: bool = False
    """All images come before the whole text and its begin-of-sequence token (PaliGemma)."""
    after_bos: bool = False
    """All images come after the begin-of-sequence token. The tokenizer has no placeholder: `token_id` is ours (OpenVLA)."""
    second_mean: tuple[float, float, float] | None = None
    second_std: tuple[float, float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; floats exact. What only some families have is left out for the others."""
        tree = asdict(self)
        return {name: value for name, value in tree.items() if name not in _LATER or value}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Self:
        """The spec that `to_json` described. Raises DataError."""
        names = {item.name for item in fields(cls)}
        if set(tree) - _LATER != names - _LATER or not set(tree) <= names:
            odd = ", ".join(sorted(map(str, set(tree) ^ (names - (_LATER - set(tree))))))
            raise DataError(
                f"a processor's image has missing or unknown values: {odd}; build it anew with this version"
            )
        limits = {"height": MAX_EDGE, "width": MAX_EDGE, "num_tokens": 1 << 20, "token_id": 1 << 31}
        for name, limit in limits.items():
            if type(tree[name]) is not int or not 0 <= tree[name] <= limit:
                raise DataError(
                    f"a processor's image.{name} is {tree[name]!r}: a whole number up to {limit} is expected"
                )
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in tree.items()
        }
        values["steps"] = tuple((str(name), int(first), int(second)) for name, first, second in tree["steps"])
        return cls(**values)
