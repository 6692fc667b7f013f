"""The reader of dataclasses that the YAML and a dataset's own options share."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from stoker_proto.config.strict import read_choice, read_dataclass, split_optional
from stoker_proto.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Camera:
    name: str
    mode: Literal["rgb", "depth"] = "rgb"
    width: int | None = None


def read(tree: dict[str, Any]) -> Camera:
    def read_value(hint: Any, value: Any, key: str) -> Any:
        hint, is_optional = split_optional(hint)
        if is_optional and value is None:
            return None
        return read_choice(hint, value, key) if hint == Literal["rgb", "depth"] else hint(value)

    return read_dataclass(Camera, tree, "camera.", read_value, lambda name, near: f"{name}? {near}")


def test_values_are_read_by_name_and_others_keep_their_defaults() -> None:
    assert read({"name": "left", "width": "3"}) == Camera(name="left", mode="rgb", width=3)
    assert read({"name": "left", "width": None, "mode": "depth"}) == Camera(name="left", mode="depth", width=None)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"name": "left", "widht": 3}, "widht? width"),
        ({"name": "left", "zoom": 3}, "zoom? None"),
        ({"name": "left", 7: 3}, "7? None"),
        ({"width": 3}, "camera.name is missing: it has no default, set it in the file or with --set"),
        ({"name": "left", "mode": "grey"}, "camera.mode is 'grey': choose one of rgb, depth"),
    ],
)
def test_everything_else_is_an_error(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tree)
    assert str(caught.value) == message


def test_a_choice_has_the_type_of_its_literal() -> None:
    assert read_choice(Literal[1, 2, 3], 1, "stage") == 1
    with pytest.raises(ConfigError, match="stage is True: choose one of 1, 2, 3"):
        read_choice(Literal[1, 2, 3], True, "stage")


def test_optional_hints_are_split() -> None:
    assert split_optional(int | None) == (int, True)
    assert split_optional(int) == (int, False)
