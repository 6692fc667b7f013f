"""`data.image`, `data.augment`, `data.action`, `data.dialogue`: how one sample becomes pixels and tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from stoker_proto.config.rules import above, allowed, at_least, between, both


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """How a camera frame becomes the model's pixels."""

    transport: Literal["base64", "jpeg", "pixels", "auto"] = "base64"
    """What is sent: the Base64 text of a JPEG, the JPEG's bytes, or raw uint8 pixels (lossless, about ten times the bytes).
    `auto`: the cheapest that trains the same pixels as `base64`, which is `jpeg`. The log has the measured cost of all three."""
    quality: int = field(
        default=95, metadata=allowed("JPEG quality lies in 1-100", lambda quality: 1 <= quality <= 100)
    )
    """JPEG quality, 1-100; chroma is stored at half resolution (4:2:0)."""
    pad_to_square: bool | None = None
    """Pad frames to a square before the model's own steps. Then a centre crop cuts nothing off wide frames, and all is seen
    smaller. Default: as the model's own processor does. `true` with a LLaVA model pads with the mean colour, and the exported
    processor does the same. With other models it pads with black; policies do the same, but transformers' processor cannot.
    `false` where the model's processor pads is an error."""
    size: tuple[int, int] | None = field(
        default=None, metadata=allowed("[height, width], both at least 1", lambda size: size is None or min(size) >= 1)
    )
    """Height and width in pixels for models that take images of any size (Qwen-VL): all frames are made that size. Others have
    their own."""
    depth: bool = False
    """Add the depth frame as a second image (see `stoker_proto.images.transport.depth_to_rgb`)."""
    depth_max_mm: int = field(default=2000, metadata=at_least(1))
    """Depth in mm that maps to white; larger depths are clipped."""

    def resolved(self) -> Self:
        """Without `auto`. A function of the config alone, so that all loaders and ranks agree, and so does a resumed run."""
        return replace(self, transport="jpeg") if self.transport == "auto" else self


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentConfig:
    """Random changes of training images, a function of (seed, epoch, sample); never applied to validation."""

    enabled: bool = False
    """Switch them on."""
    crop_area: float = field(
        default=0.9, metadata=both(above(0), allowed("a share of the image, at most 1", lambda share: share <= 1))
    )
    """Share of the image's area that a random crop keeps (OpenVLA: 0.9). 1: no cropping."""
    brightness: float = field(default=0.2, metadata=between(0, 1))
    """Largest relative change of brightness."""
    contrast: float = field(default=0.2, metadata=between(0, 1))
    """Largest relative change of contrast."""
    saturation: float = field(default=0.2, metadata=between(0, 1))
    """Largest relative change of saturation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionConfig:
    """How actions become tokens and tokens become actions."""

    codec: Literal["vq", "bins", "fast"] = "vq"
    """`vq`: k-means codebook with residual levels, fitted by `loader-prepare`; `bins`: OpenVLA's 256 uniform bins; `fast`: cosine
    transform of the whole chunk, then byte-pair encoding: a variable number of tokens, the fewest for chunks of 5 and more."""
    chunk: int = field(default=1, metadata=at_least(1))
    """Consecutive actions predicted at each timestep. Chunks that reach beyond a trajectory repeat its final action."""
    vocabulary: Literal["reuse_last", "added"] = "reuse_last"
    """`reuse_last`: actions take the last ids of the tokenizer's vocabulary, as OpenVLA does; `added`: new tokens."""
    codec_path: str | None = None
    """Use this fitted codec (`loader-prepare --codec-out FILE`) and do not fit one. Needed where loaders hold different data."""
    codec_options: dict[str, Any] = field(default_factory=dict)
    """Passed to the codec's fit: `{codebook_size: 256, levels: 4}` (vq), `{num_bins: 256}` (bins), `{vocab_size: 1024, scale: 10,
    min_frequency: 2}` (fast)."""
    statistics_path: str | None = None
    """Normalise by the statistics in this file (LeRobot's `meta/stats.json`, OpenVLA's `dataset_statistics.json`) instead of the
    statistics of the train data."""
    unmasked: tuple[int, ...] | None = None
    """Dimensions that are not normalised by their quantiles; their values must lie in [-1, 1]. `[]`: all are normalised. Default:
    the gripper (dimension 6) of 7 dimensions where it lies in [-1, 1] and the data's own names do not say otherwise, as in
    OpenVLA; with `statistics_path`, what that file's `mask` says."""
    most_clamped: float = field(default=0.3, metadata=between(0, 1))
    """Largest share of a dimension's numbers that the codec may clamp. A larger one is an error of `loader-prepare`. The data's
    own statistics clamp at most 2%; LeRobot's published ones clamp up to 20% of short episodes."""
    learn_padding: bool = True
    """Whether a chunk's timesteps beyond the trajectory's ends, which repeat its last (or first) action, are labels. `false`
    needs a codec with separate tokens for each timestep (`vq`, `bins`)."""
    drop_noops: bool = False
    """Leave out timesteps whose action moves nothing (|dxyz| <= 0.01 and |drot| <= 0.06) and does not change the gripper."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DialogueConfig:
    """How a sample is written as text."""

    template: Literal["auto", "stoker", "openvla", "chat_template", "custom"] = "auto"
    """`auto`: the model's own chat template where it has one, else `stoker`; `openvla` for a model of type openvla. It holds for
    robots' samples too: an instruct model sees the turns that it knows.
    `stoker`: `<|User|> {image} {instruction} <|Assistant|> {answer}`; `openvla`: `In: What action ...? Out: {answer}`;
    `chat_template`: the model's own; `custom`: `user` below. Dialogues of several turns need `stoker` or `chat_template`."""
    template_options: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, e.g. `{enable_thinking: false, date: 2025-06-30}`. `date` is also the day that a template
    writes as today's (`strftime_now`). Without it, templates write the fixed date that they have for that case."""
    assistant_tokens: tuple[str, ...] | None = None
    """Special tokens that the assistant's text may contain as tokens. Default: marks of reasoning and of calls (`<think>`,
    `</think>`, `<tool_call>`, ...), as far as the tokenizer has them. Any other special token in the data is written as text. In
    other turns all of them are. Added tokens that are not special are tokens everywhere. Tokens that open or end turns cannot be
    named."""
    user: str | None = None
    """With `custom`: the text before the answer, in which `{image}`, `{instruction}` and `{state}` are replaced."""
    end: str | None = None
    """Token that ends the answer and is a label; default: the tokenizer's end-of-sequence token."""
