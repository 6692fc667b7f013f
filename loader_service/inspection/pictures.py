"""The images of a row as the model will see them: decoded from the bytes on the wire, side by side in one PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from loader_service.inspection.rows import InspectedRow
from stoker_proto.errors import ConfigError
from stoker_proto.processor import Processor


def write_pictures(row: InspectedRow, processor: Processor, folder: Path) -> Path | None:
    """`{split}-{entry}-record{r}-sample{s}.png`; None where the row has no image. Raises ConfigError where it cannot
    be written."""
    images = [image for sample in row.samples if sample.encoded is not None for image in sample.encoded.images]
    if not images or processor.image is None:
        return None
    height, width = processor.image.height, processor.image.width
    strip = np.empty((height, len(images) * width, 3), np.uint8)
    for number, data in enumerate(images):
        pixels = np.empty((height, width, 3), np.uint8)
        processor.decode_image(data, pixels)
        strip[:, number * width : (number + 1) * width] = pixels
    ref = row.samples[0].ref
    path = folder / f"{row.manifest.split}-{row.manifest.entry}-record{ref.record}-sample{ref.sample}.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(strip).save(path)
    except OSError as error:
        raise ConfigError(
            f"--images {folder} cannot be written ({error.strerror or error}): name another folder"
        ) from error
    return path
