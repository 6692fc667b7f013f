"""The content of a message in OpenAI's and transformers' forms -> its text, and the images that are marked in it.

"Hi"
[{"type": "text", "text": "What is "}, {"type": "image_url", "image_url": {"url": "a.png"}}]
[{"type": "image"}, {"type": "text", "text": "What is this?"}]          the next of the row's `images`
[{"type": "image", "url": "a.png"}]                                     or path, image, base64
"""

from __future__ import annotations

from typing import Any

from loader_service.sources.chat.message import Role, text_of
from stoker_proto.errors import DataError
from stoker_proto.text.turns import IMAGE, IMAGE_ROLES

_TEXTS = ("text", "input_text", "output_text")
_IMAGES = ("image_url", "image", "input_image")
_NAMES = ("image_url", "image", "url", "path", "base64")
"""Fields of a part that say which image it is."""


def content_of(content: object, role: Role, field: str, *, has_images: bool) -> tuple[str, tuple[Any, ...]]:
    """The text with its marks, and of a list of parts their images; None for one that is the next of the row's.

    has_images: the row has some. Raises DataError.
    """
    if isinstance(content, str):
        return content, ()
    if not isinstance(content, list):
        raise DataError(f"{type(content).__name__}: a text or a list of parts is expected", field=field)
    texts: list[str] = []
    images: list[Any] = []
    for i, part in enumerate(content):
        place = f"{field}[{i}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in _TEXTS:
            texts.append(text_of(part.get("text"), f"{place}.text"))
            images += [None] * (texts[-1].count(IMAGE) if role in IMAGE_ROLES else 0)
        elif kind in _IMAGES:
            if role not in IMAGE_ROLES:
                raise DataError(
                    f"an image in a turn of role {role}: images are read in those of {' and '.join(IMAGE_ROLES)}",
                    field=place,
                )
            image = _image_of(part)
            if image is None and not has_images:
                raise DataError(f"an image part without {', '.join(_NAMES)}, and the row has no images", field=place)
            texts.append(IMAGE)
            images.append(image)
        else:
            shown = kind if isinstance(part, dict) else type(part).__name__
            raise DataError(f"a part of type {shown!r}: text, image_url and image are read", field=place)
    return "".join(texts), tuple(images)


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
