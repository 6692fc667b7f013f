"""Views: windows of a camera frame, fixed or around the projected hand; one object for loader and policy."""

from __future__ import annotations

import numpy as np
import pytest

from stoker_proto.errors import ConfigError, DataError
from stoker_proto.images.views import Views, hand_pixel, views_of_sources

FRAME = np.random.default_rng(0).integers(1, 256, (20, 30, 3), dtype=np.uint8)


def looking_down(x: float, y: float, z: float = 0.5) -> dict[str, np.ndarray]:
    """A camera 1 m above the origin that looks down, 10 pixels a metre at 1 m, its middle at column 15, row 10."""
    return {
        "tcp_pose": np.array([x, y, z, 1, 0, 0, 0], np.float32),
        "intrinsic_cv": np.array([[10, 0, 15], [0, 10, 10], [0, 0, 1]], np.float32),
        "extrinsic_cv": np.array([[1, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 1]], np.float32),
        "qpos": np.zeros(9, np.float32),
    }


@pytest.mark.parametrize(("place", "pixel"), [
    ((0.0, 0.0, 0.5), (10, 15)),
    ((0.1, 0.2, 0.0), (8, 16)),      # 1 m away: 1 pixel right, 2 up
    ((0.1, 0.2, 0.5), (6, 17)),      # half as far: twice
    ((0.25, 0.0, 0.0), (10, 18)),    # column 17.5, rounded up
    ((-0.25, 0.0, 0.0), (10, 13)),   # column 12.5, rounded up
    ((9.0, 0.0, 0.0), (10, 105)),    # outside of the frame
])  # fmt: skip
def test_the_hand_is_projected_by_the_cameras_matrices(
    place: tuple[float, float, float], pixel: tuple[int, int]
) -> None:
    assert hand_pixel(looking_down(*place)) == pixel


def test_windows_are_the_pixels_of_the_frame_and_black_beyond_it() -> None:
    views = Views.parse([{"crop": [2, 3, 10, 5]}, {"hand": [6, 8]}])
    crop, hand = views.cut(FRAME, looking_down(0.0, 0.0))
    np.testing.assert_array_equal(crop, FRAME[2:12, 3:8])
    np.testing.assert_array_equal(hand, FRAME[7:13, 11:19])
    _, hand = views.cut(FRAME, looking_down(1.4, 0.9, 0.0))  # row 1, column 29
    assert hand.shape == (6, 8, 3)
    np.testing.assert_array_equal(hand[2:, :5], FRAME[:4, 25:])
    assert not hand[:2].any()
    assert not hand[:, 5:].any()
    for far in (looking_down(90, 0), looking_down(-90, 0), looking_down(0, 90), looking_down(0, -90)):
        assert not views.cut(FRAME, far)[1].any()


@pytest.mark.parametrize(("changes", "message"), [
    ({"tcp_pose": np.array([0, 0, 2, 1, 0, 0, 0], np.float32)}, "not in front of the camera"),
    ({"tcp_pose": np.full(7, np.nan, np.float32)}, "not in front of the camera"),
    ({"intrinsic_cv": np.zeros((3, 4), np.float32)}, r"shape \[3, 4\]: \[3, 3\] is expected"),
])  # fmt: skip
def test_a_hand_that_cannot_be_projected_is_an_error(changes: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Views.parse([{"hand": [4, 4]}]).cut(FRAME, looking_down(0, 0) | changes)
    fixed = Views.parse([{"crop": [0, 0, 4, 4]}])
    assert fixed.needed == ()
    fixed.cut(FRAME, {})  # it looks at no measurement
    with pytest.raises(DataError, match=r"needs tcp_pose float32\[7\]; here are: none"):
        Views.parse([{"hand": [4, 4]}]).cut(FRAME, {})


def test_a_crop_beyond_the_frame_is_an_error() -> None:
    with pytest.raises(DataError, match=r"20 x 30 pixels.*\[11, 0, 10, 4\].*reaches beyond it"):
        Views.parse([{"crop": [11, 0, 10, 4]}]).cut(FRAME, {})


@pytest.mark.parametrize("value", [[], {}, "hand", [{"hand": [4]}], [{"hand": [0, 4]}], [{"crop": [1, 2, 3]}], [{"near": [4, 4]}],
                                   [{"hand": [4, True]}], [{"hand": [4, 4], "crop": [0, 0, 4, 4]}]])  # fmt: skip
def test_a_wrong_option_is_an_error_with_an_example(value: object) -> None:
    with pytest.raises(ConfigError, match=r"data\.options\.views.*hand: \[\w+"):
        Views.parse(value)


def test_all_sources_have_the_same_views() -> None:
    views = [{"hand": [4, 4]}]
    found = views_of_sources({"source 0": {"views": views}, "source 1": {}, "source 2": {"views": views}})
    assert found is not None
    assert found.to_json() == [{"hand": [4, 4]}]
    with pytest.raises(ConfigError, match=r"different views \(source 0: .*source 1"):
        views_of_sources({"source 0": {"views": views}, "source 1": {"views": [{"hand": [5, 4]}]}})
