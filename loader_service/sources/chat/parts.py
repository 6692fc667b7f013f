"""The content of a message in OpenAI's and transformers' forms -> its text, and the images that are marked in it.

"Hi"
[{"type": "text", "text": "What is "}, {"type": "image_url", "image_url": {"url": "a.png"}}]
[{"type": "image"}, {"type": "text", "text": "What is this?"}]          the next of the row's `images`
[{"type": "image", "url": "a.png"}]                                     or path, image, base64
[{"type": "thinking", "thinking": "A cube?"}, {"type": "text", "text": "A cube."}]        or reasoning; of the assistant
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from loader_service.sources.chat.message import Role, text_of
from loader_service.sources.chat.turn_fields import HIDDEN, LEARNED
from loader_service.sources.fields import says_something, unread
from loader_service.sources.half_characters import refuse_half
from stoker_proto.errors import DataError
from stoker_proto.text.turns import IMAGE, IMAGE_ROLES

_TEXTS = ("text", "input_text", "output_text")
_IMAGES = ("image_url", "image", "input_image")
_THOUGHTS = ("thinking", "reasoning")
_NAMES = ("image_url", "image", "url", "path", "base64")
"""Fields of a part that say which image it is."""
_KNOWN = {
    **dict.fromkeys(_TEXTS, ("type", "text")),
    **dict.fromkeys(_IMAGES, ("type", *_NAMES)),
    **dict.fromkeys(_THOUGHTS, ("type", "text", *_THOUGHTS)),
}


@dataclass(slots=True)
class Content:
    """What the content of a message says."""

    text: str
    """With marks for images."""
    images: list[Any] = field(default_factory=list)
    """Those of a list of parts; None for one that is the next of the row's."""
    reasoning: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """On fields that are not read."""


def content_of(content: object, role: Role, field: str, *, has_images: bool) -> Content:
    """The text with its marks, images and reasoning. has_images: the row has some. Raises DataError."""
    if isinstance(content, str):
        return Content(content)
    refuse_half(content, field)
    if not isinstance(content, list):
        raise DataError(f"{type(content).__name__}: a text or a list of parts is expected", field=field)
    found = Content("")
    for i, part in enumerate(content):
        place = f"{field}[{i}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in _KNOWN:
            shown = kind if isinstance(part, dict) else type(part).__name__
            raise DataError(f"a part of type {shown!r}: text, image_url, image and thinking are read", field=place)
        _check_flags(part, place)
        found.notes += unread(part, _KNOWN[kind], "part")
        if kind in _TEXTS:
            text = text_of(part.get("text"), f"{place}.text")
            found.text += text
            found.images += [None] * (text.count(IMAGE) if role in IMAGE_ROLES else 0)
        elif kind in _THOUGHTS:
            found.reasoning.append(_thought_of(part, role, place))
        else:
            found.images.append(_image_of_part(part, role, place, has_images=has_images))
            found.text += IMAGE
    return found


def _check_flags(part: dict[str, Any], place: str) -> None:
    flag = next(
        (name for name in (*LEARNED, *HIDDEN) if says_something(part.get(name)) or part.get(name) is False), None
    )
    if flag is not None:
        raise DataError("a part of a turn cannot be left out: put the flag on the turn", field=f"{place}.{flag}")


def _thought_of(part: dict[str, Any], role: Role, place: str) -> str:
    if role != "assistant":
        raise DataError(f"reasoning in a turn of role {role}: only the assistant's is read", field=place)
    name = next((name for name in (*_THOUGHTS, "text") if part.get(name) is not None), "text")
    return text_of(part.get(name), f"{place}.{name}")


def _image_of_part(part: dict[str, Any], role: Role, place: str, *, has_images: bool) -> Any:
    if role not in IMAGE_ROLES:
        raise DataError(
            f"an image in a turn of role {role}: images are read in those of {' and '.join(IMAGE_ROLES)}", field=place
        )
    image = _image_of(part)
    if image is None and not has_images:
        raise DataError(f"an image part without {', '.join(_NAMES)}, and the row has no images", field=place)
    return image


def _image_of(part: dict[str, Any]) -> Any:
    """The image that a part names or carries; None: none."""
    for name in _NAMES:
        value = part.get(name)
        if isinstance(value, dict) and "url" in value:
            value = value["url"]
        if value is None:
            continue
        if name == "base64" and isinstance(value, str) and not value.startswith("data:"):
            return f"data:image/*;base64,{value}"
        return value
    return None
