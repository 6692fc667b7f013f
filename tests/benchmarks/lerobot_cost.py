"""What a sample of a LeRobot data set costs: our reader and the whole loader, beside straight readers of the same libraries.

`read`: PyAV decodes every file from its beginning to its end, pyarrow reads the tables, nothing else; against
`LeRobotDataset.read` in the order of a shuffled epoch, scan included. `loader`: the straight reader plus JPEG, Base64 and
msgpack; against `loader-serve` with a null trainer. On the same synthetic files, in interleaved rounds of one run; medians of CPU
time.

    python tests/benchmarks/lerobot_cost.py [--episodes 32] [--rounds 5] [--loader] [--codec libx264 --codec libsvtav1]
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import msgpack
import numpy as np
import pyarrow.parquet as pq
import pybase64
import simplejpeg
import yaml
from av.video.reformatter import VideoReformatter

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT), str(ROOT / "proto")]

from loader_cost import bench, loaders, run_tool  # noqa: E402 - found through the line above
from synthetic import rendered_frames  # noqa: E402

from loader_service.sources.lerobot.dataset import LeRobotDataset  # noqa: E402
from stoker_proto.config import DataConfig  # noqa: E402
from tests.loader_service.sources.lerobot.files import write_lerobot  # noqa: E402

CAMERAS = ("observation.images.front", "observation.images.wrist")
ENCODERS = {
    "libsvtav1": {"crf": "30", "g": "2", "preset": "8", "svtav1-params": "lp=1"},
    "libx264": {"crf": "23", "g": "2", "threads": "1"},
}
"""lerobot's own settings: a keyframe every other frame."""


def main() -> None:
    """Make the data, run all rounds, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=32, help="of 50 frames, 2 cameras; default: %(default)s")
    parser.add_argument("--size", type=int, default=256, help="pixels of a side; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved; default: %(default)s")
    parser.add_argument("--codec", action="append", choices=list(ENCODERS), help="default: both")
    parser.add_argument("--loader", action="store_true", help="measure the whole loader too")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/bench", help="where data is made and kept")
    arguments = parser.parse_args()
    for codec in arguments.codec or ENCODERS:
        root = make_data(arguments, codec)
        straight, ours = [], []
        for _ in range(arguments.rounds):
            straight.append(timed(lambda root=root: sum(1 for _ in straight_samples(root))))
            ours.append(timed(lambda root=root: read_shuffled(root)))
        print(line(f"{codec} read", straight, ours))
        if arguments.loader:
            measure_loader(arguments, root, codec)


def line(name: str, straight: list[float], ours: list[float]) -> str:
    """Medians and their ratio."""
    a, b = statistics.median(straight), statistics.median(ours)
    ratios = [y / x for x, y in zip(straight, ours, strict=True)]
    return (
        f"{name:17} straight {a:.3f} | stoker {b:.3f} CPU ms/sample (2 cameras) = {b / a:.2f}x "
        f"(rounds {min(ratios):.2f}-{max(ratios):.2f}x)"
    )


def timed(run: Any) -> float:
    """CPU ms per sample; run gives the number of samples."""
    start = time.process_time()
    count = run()
    return 1e3 * (time.process_time() - start) / count


def make_data(arguments: argparse.Namespace, codec: str) -> Path:
    """A v3.0 data set of rendered-like frames, 8 episodes to a video file, all rows in one data file."""
    root: Path = arguments.folder / f"lerobot-{codec}-{arguments.episodes}-{arguments.size}"
    if not root.exists():
        size = arguments.size

        @lru_cache(maxsize=4)
        def frames(episode: int, camera: int) -> np.ndarray:
            return rendered_frames(np.random.default_rng([episode, camera]), 50, size)

        write_lerobot(
            root, [50] * arguments.episodes, videos=CAMERAS, size=(size, size), codec=codec, encoder=ENCODERS[codec],
            episodes_per_video_file=8, rows_per_data_file=10**6, chunks_size=1000, paint=lambda e, t, c: frames(e, c)[t],
        )  # fmt: skip
    return root


def straight_samples(root: Path) -> Iterator[tuple[list[np.ndarray], np.ndarray, np.ndarray]]:
    """All samples in the order of the files: images, state, action."""
    tables = [pq.read_table(file, partitioning=None, use_threads=False) for file in sorted(root.glob("data/*/*"))]
    columns = {}
    for name in ("observation.state", "action"):
        parts = [table.column(name).combine_chunks() for table in tables]
        columns[name] = np.concatenate([part.flatten().to_numpy().reshape(len(part), -1) for part in parts])
    streams = [straight_frames(sorted(root.glob(f"videos/{key}/*/*.mp4"))) for key in CAMERAS]
    for state, action, *images in zip(*columns.values(), *streams, strict=True):
        yield images, state, action


def straight_frames(files: list[Path]) -> Iterator[np.ndarray]:
    """Every frame of the files."""
    for file in files:
        with av.open(file) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            reformatter = VideoReformatter()
            for frame in container.decode(stream):
                yield reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()


def read_shuffled(root: Path) -> int:
    """All samples through our dataset, episodes in random order."""
    dataset = LeRobotDataset(DataConfig(dataset_type="lerobot", train_data_paths=(str(root),), max_seq_len=8))
    places = [(shard, r.offset, r.size) for shard in dataset.locate(str(root)).paths for r in dataset.scan(shard)]
    random.Random(0).shuffle(places)
    return sum(1 for place in places for sample in dataset.read(*place) if len(sample.images) == len(CAMERAS))


def measure_loader(arguments: argparse.Namespace, root: Path, codec: str) -> None:
    """The straight reader with JPEG, Base64 and msgpack against loader-serve."""
    model = arguments.folder / "model"
    if not model.exists():
        run_tool("trainer.models.tiny", "--family", "llava", "--image-size", str(arguments.size), "--out", str(model))
    tree = {
        "model": {"base_model_path": str(model)},
        "data": {
            "dataset_type": "lerobot", "train_data_paths": [str(root)], "max_seq_len": 1024, "action": {"codec": "bins"},
        },
        "trainer": {"micro_batch_size": 32, "global_batch_size": 32, "lr": 1e-4},
    }  # fmt: skip
    config = root / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    run_tool("loader_service.cli", "prepare", "--config", str(config))
    straight, ours = [], []
    for _ in range(arguments.rounds):
        straight.append(timed(lambda: straight_pieces(root)))
        with loaders(config, 1) as addresses:
            ours.append(bench(config, addresses)["loader_cpu_ms_per_sample"])
    print(line(f"{codec} loader", straight, ours))


def straight_pieces(root: Path) -> int:
    """As tests/benchmarks/pipelines.py does with NPZ files: 32 samples to a message."""
    count, batch = 0, []
    for images, _, action in straight_samples(root):
        ids = 1023 - np.digitize(np.clip(action, -1, 1), np.linspace(-1, 1, 256))
        jpegs = [pybase64.b64encode(simplejpeg.encode_jpeg(image, 95, "RGB", "420")) for image in images]
        batch.append({"ids": [*range(20), *ids.tolist()], "images": jpegs})
        count += 1
        if len(batch) == 32:
            assert len(msgpack.packb(batch))
            batch = []
    return count


if __name__ == "__main__":
    main()
