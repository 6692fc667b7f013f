"""Frames of awkward sizes, and the published image settings of families of VLMs. Needs numpy alone: see `make_golden_pixels.py`.

"qwen2_5_vl", a frame of 75 x 100 -> its processor makes 84 x 112, or 6 x 8 patches
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_QWEN = {"image_processor_type": "Qwen2VLImageProcessorFast", "temporal_patch_size": 2, "merge_size": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {**_QWEN, **_CLIP, "patch_size": 14, "min_pixels": 3136, "max_pixels": 12845056},
    "qwen3_vl": {**_QWEN, **_HALF, "patch_size": 16, "size": {"shortest_edge": 65536, "longest_edge": 16777216}},
    "paligemma": {
        **_HALF, "image_processor_type": "SiglipImageProcessor", "size": {"height": 224, "width": 224}, "resample": 3,
        "image_seq_length": 256, "do_convert_rgb": None, "rescale_factor": 0.00392156862745098,
    },
    "internvl": {
        "image_processor_type": "GotOcr2ImageProcessorFast", "size": {"height": 448, "width": 448}, "resample": 3,
        "crop_to_patches": False, "max_patches": 12, "min_patches": 1, "do_convert_rgb": True,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "rescale_factor": 0.00392156862745098,
    },
}  # fmt: skip
"""preprocessor_config.json of Qwen2.5-VL-3B-Instruct, Qwen3-VL-2B-Instruct, paligemma-3b-pt-224 and InternVL3-1B-hf."""
FRAMES = {"qwen2_5_vl": ((75, 100), (61, 37)), "qwen3_vl": ((281, 190), (97, 333))}
ANY_FRAMES = ((131, 97), (480, 640), (53, 611))
NUM_VALUES = 512


def cases() -> list[tuple[str, int, int]]:
    """(family, height, width of the frame in pixels)."""
    return [(family, *size) for family in SETTINGS for size in FRAMES.get(family, ANY_FRAMES)]


def make_frame(height: int, width: int) -> NDArray[np.uint8]:
    """uint8[height, width, 3]: left half noise, right half a smooth slope with one hard edge."""
    rows, columns, channels = np.meshgrid(*(np.arange(n, dtype=np.uint64) for n in (height, width, 3)), indexing="ij")
    noise = (
        (rows * np.uint64(7919) + columns * np.uint64(104729) + channels * np.uint64(1299709)) ** np.uint64(2)
    ) >> np.uint64(7)
    smooth = rows * np.uint64(200) // np.uint64(height) + channels * np.uint64(20)
    smooth = np.where(columns > 3 * width // 4, np.uint64(255) - smooth, smooth)
    return np.where(columns < width // 2, noise % np.uint64(256), smooth).astype(np.uint8)


def chosen(size: int) -> NDArray[np.int64]:
    """int64[NUM_VALUES]: which of `size` values are kept, spread over all of them."""
    return (np.arange(NUM_VALUES, dtype=np.int64) * 7368787 + 3) % size
