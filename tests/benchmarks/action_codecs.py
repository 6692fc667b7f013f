"""What a second of robot time costs in tokens and what it loses: `python tests/benchmarks/action_codecs.py [--lerobot FOLDER]`.

Fitted on some trajectories and measured on others: the shipped demonstrations (train.jsonl, val.jsonl; 20 Hz) and, where a
LeRobot v3.0 folder is named, its episodes, every fifth held out. Every timestep begins a chunk, as in training; tokens per
second are those of executing whole chunks one after the other. Errors are in action units, over all dimensions.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "proto"))

from loader_service.sources.trajectory import moments
from stoker_proto.actions import ActionStatistics, StatisticsAccumulator, codec_class, codec_report, fit_codec

Trajectories = list[NDArray[np.float32]]
CODECS: list[tuple[str, dict[str, float]]] = [("vq", {}), ("bins", {}), ("fast", {}), ("fast", {"scale": 50.0})]
DEMONSTRATIONS = Path(__file__).resolve().parents[1] / "data" / "maniskill"


def main() -> None:
    """Print one table per source."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lerobot", type=Path, help="a LeRobot v3.0 folder (needs pyarrow)")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 5, 10], metavar="K")
    arguments = parser.parse_args()
    train, held_out = (_demonstrations(DEMONSTRATIONS / f"{split}.jsonl") for split in ("train", "val"))
    _table("demonstrations of this repository", train, held_out, 20.0, arguments.chunks)
    if arguments.lerobot is not None:
        episodes, fps = _lerobot(arguments.lerobot)
        train = [episode for i, episode in enumerate(episodes) if i % 5 != 4]
        _table(str(arguments.lerobot.name), train, episodes[4::5], fps, arguments.chunks)


def _table(title: str, train: Trajectories, held_out: Trajectories, fps: float, chunks: list[int]) -> None:
    actions, others = sum(map(len, train)), sum(map(len, held_out))
    print(
        f"\n{title}: fitted on {len(train)} trajectories ({actions} actions), measured on {len(held_out)} ({others})\n"
    )
    print("| chunk | codec | tokens per second | per chunk (most) | rms error | max error | clamped | fit | encode |")
    print("|---|---|---|---|---|---|---|---|---|")
    statistics, sample = _summary(np.concatenate(train))
    for chunk in chunks:
        fitted, measured = (
            np.concatenate([t[moments(len(t), np.arange(chunk)).positions] for t in part]) for part in (train, held_out)
        )
        for name, options in CODECS:
            began = time.process_time()
            given = fitted if codec_class(name).fits_chunks else sample
            codec = fit_codec(name, given, statistics, chunk=chunk, **options)
            fit_s = time.process_time() - began
            began = time.process_time()
            codec.encode(measured)
            encode_us = 1e6 * (time.process_time() - began) / len(measured)
            report = codec_report(codec, measured)
            print(
                f"| {chunk} | `{name}` {_words(options)}| {fps * report.tokens_per_action:.1f} "
                f"| {chunk * report.tokens_per_action:.1f} ({report.most_tokens}) | {report.rms_error_of_all:.4f} "
                f"| {report.max_abs_error.max():.3f} | {report.clamped:.2%} | {fit_s:.2f} s | {encode_us:.0f} us |"
            )


def _words(options: dict[str, float]) -> str:
    return "".join(f"{name} {value:g} " for name, value in options.items())


def _summary(actions: NDArray[np.float32]) -> tuple[ActionStatistics, NDArray[np.float32]]:
    accumulator = StatisticsAccumulator(actions.shape[1])
    accumulator.add(actions, np.arange(len(actions), dtype=np.uint64))
    return accumulator.finish()


def _demonstrations(file: Path) -> Trajectories:
    return [np.array(json.loads(line)["actions"], dtype=np.float32) for line in file.read_text().splitlines()]


def _lerobot(folder: Path) -> tuple[Trajectories, float]:
    """Actions of every episode, and frames per second."""
    from pyarrow import parquet

    fps = float(json.loads((folder / "meta" / "info.json").read_text())["fps"])
    episodes: dict[int, list[list[float]]] = {}
    for file in sorted((folder / "data").glob("*/*.parquet")):
        table = parquet.read_table(file, columns=["episode_index", "action"])
        for number, action in zip(table["episode_index"].to_pylist(), table["action"].to_pylist(), strict=True):
            episodes.setdefault(number, []).append(action)
    return [np.array(episodes[number], dtype=np.float32) for number in sorted(episodes)], fps


if __name__ == "__main__":
    main()
