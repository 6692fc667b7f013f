"""LeRobot's own data set class in torch's DataLoader, in random order. To resume, the sampler begins in the middle.

It gives float32 frames, no JPEG and no Base64: less work than Stoker does on the same files.
"""

from __future__ import annotations

import random

import numpy as np
from contract import BATCH, Ask, Batches, nothing_to_start, run
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from torch.utils.data import DataLoader

try:
    import torchcodec  # noqa: F401 - LeRobot's default decoder
except RuntimeError as error:
    raise SystemExit("torchcodec finds no FFmpeg libraries: install ffmpeg (4 to 8) on this machine") from error


def batches(ask: Ask, epoch: int, first_batch: int) -> Batches:
    """The epoch from a batch on."""
    dataset = LeRobotDataset("local/benchmark", root=ask.data)
    order = random.Random(epoch).sample(range(len(dataset)), min(ask.samples, len(dataset)))
    loader = DataLoader(
        dataset, BATCH, sampler=order[first_batch * BATCH :], num_workers=ask.workers, multiprocessing_context="fork"
    )
    for batch in loader:
        frames = sum(batch[key].numel() for key in dataset.meta.camera_keys)
        keys = [batch["episode_index"].numpy(), batch["frame_index"].numpy()]
        yield np.stack(keys, axis=1), frames


if __name__ == "__main__":
    run(nothing_to_start(batches))
