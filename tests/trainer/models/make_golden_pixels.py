"""Write tests/data/pixels/golden.npz: pixels as the image processors of transformers make them with torchvision.

In an environment of its own, as Stoker's own has no torchvision:

    python3.11 -m venv golden
    golden/bin/pip install -c deploy/constraints.txt torch transformers numpy pillow
    golden/bin/pip install --no-deps torchvision==0.28.0
    golden/bin/python tests/trainer/models/make_golden_pixels.py

Per case: the shape of pixel_values, NUM_VALUES of its values, means and standard deviations of all, and image_grid_thw.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import pixel_cases

_library = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):  # torchvision's own binary may not fit this torch; resizing needs none of it
    _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

PROCESSORS = {
    "qwen2_5_vl": ("qwen2_vl.image_processing_qwen2_vl", "Qwen2VLImageProcessor"),
    "qwen3_vl": ("qwen2_vl.image_processing_qwen2_vl", "Qwen2VLImageProcessor"),
    "paligemma": ("siglip.image_processing_siglip", "SiglipImageProcessor"),
    "internvl": ("got_ocr2.image_processing_got_ocr2", "GotOcr2ImageProcessor"),
}
OUT = Path(__file__).parents[2] / "data" / "pixels" / "golden.npz"


def main() -> None:
    """Write the file."""
    found: dict[str, Any] = {}
    for family, height, width in pixel_cases.cases():
        module, name = PROCESSORS[family]
        kind = getattr(importlib.import_module(f"transformers.models.{module}"), name)
        assert "torchvision" in {base.__name__.lower()[:11] for base in kind.__mro__}, kind.__mro__
        processor = kind(**{k: v for k, v in pixel_cases.SETTINGS[family].items() if k != "image_processor_type"})
        made = processor(images=[pixel_cases.make_frame(height, width)], return_tensors="pt")
        pixels = made["pixel_values"].numpy()
        case = f"{family}/{height}x{width}"
        found[f"{case}/shape"] = np.array(pixels.shape)
        found[f"{case}/values"] = pixels.reshape(-1)[pixel_cases.chosen(pixels.size)].astype(np.float32)
        found[f"{case}/moments"] = np.array([pixels.mean(dtype=np.float64), pixels.std(dtype=np.float64)])
        if "image_grid_thw" in made:
            found[f"{case}/grid"] = made["image_grid_thw"].numpy()
    OUT.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(OUT, **found)
    print(f"{OUT}: {len(pixel_cases.cases())} cases, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
