"""Real `loader-serve` processes and real feeds over real sockets, for tests."""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from stoker_proto.config.reader import load_config
from trainer.feed.batch import MicroBatch
from trainer.feed.feed import Feed

ROOT = Path(__file__).resolve().parents[2]
START_DEADLINE_S = 120.0


def environment(**more: str) -> dict[str, str]:
    """The environment of a child: packages found, numeric libraries on one thread."""
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}", "OMP_NUM_THREADS": "1"} | more


@dataclass
class Loader:
    """A running `loader-serve`."""

    process: subprocess.Popen[str]
    address: str
    ready_line: str

    def end(self, sign: int = signal.SIGTERM) -> int:
        """Signal it and wait; its exit code."""
        self.process.send_signal(sign)
        return self.process.wait(60)


@contextmanager
def serving(
    config: Path, *arguments: str, cwd: Path = ROOT, log: Path | None = None, prefix: Sequence[str] = (), **env: str
) -> Iterator[Loader]:
    """One loader on a free port, until the block ends; its stderr goes to `log`, `prefix` before its command."""
    command = [*prefix, sys.executable, "-m", "loader_service.cli", "serve", "--config", str(config), *arguments]
    if "--bind" not in arguments:
        command += ["--bind", "tcp://127.0.0.1:*"]
    with log.open("a") if log else nullcontext() as stderr:
        process = subprocess.Popen(
            command, cwd=cwd, env=environment(**env), stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    try:
        assert process.stdout
        readable, _, _ = select.select([process.stdout], [], [], START_DEADLINE_S)
        line = process.stdout.readline() if readable else ""
        assert line.startswith("loader-serve ready"), f"no ready line, but {line!r}"
        yield Loader(process, line.split()[2], line)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def run_cli(*arguments: str, cwd: Path = ROOT, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """`python -m loader_service.cli ...`."""
    return run_program("loader_service.cli", *arguments, cwd=cwd, timeout=timeout)


def run_program(
    module: str, *arguments: str, cwd: Path = ROOT, timeout: float = 120, **env: str
) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE ...` to its end."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=timeout)


def write_demonstrations(folder: Path, lengths: Sequence[int], *, seed: int = 0, size: int = 32) -> Path:
    """JSONL and deflated NPZ trajectories of random boxes; the JSONL's path."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "demos.jsonl").open("w") as lines:
        for i, length in enumerate(lengths):
            path = folder / f"traj_{i}" / "obs.npz"
            path.parent.mkdir()
            rgb = np.zeros((length, size, size, 3), np.uint8) + rng.integers(0, 255, (length, 1, 1, 3), np.uint8)
            np.savez_compressed(path, rgb=rgb)
            actions = np.round(rng.uniform(-1, 1, (length, 7)), 6).tolist()
            row = {"obs_path": f"traj_{i}/obs.npz", "task": "PickCube-v1", "actions": actions}
            lines.write(json.dumps(row) + "\n")
    return folder / "demos.jsonl"


def write_config(folder: Path, model: Path, train: Sequence[Path], **data: Any) -> Path:
    """A YAML over the given shards; keyword arguments are keys of `data`."""
    tree = {
        "model": {"base_model_path": str(model)},
        "data": {
            "dataset_type": "mani_openpi",
            "train_data_paths": [str(path) for path in train],
            "max_seq_len": 256,
            "cache_dir": str(folder / "cache"),
            "action": {"codec": "bins"},
            "dialogue": {"template": "stoker"},
            "order": {"lanes": 4, "window_records": 3, "cell": 3},
            **data,
        },
        "loader": {"workers": 1},
        "trainer": {"micro_batch_size": 4, "global_batch_size": 8, "lr": 1e-3},
    }
    path = folder / f"config-{len(list(folder.glob('config-*')))}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def micro_batches_of(config: Path) -> list[MicroBatch]:
    """All that the one rank of a run gets in an epoch, from a loader of its own."""
    with serving(config) as loader:
        loaded = load_config(config, [f"cluster.loader_addresses=[{loader.address}]"])
        with Feed(loaded, "train", 0, 1) as feed:
            feed.connect()
            return [micro for step in feed.steps(0, 0) for micro in step.micro_batches]


@dataclass
class Pulled:
    """What the ranks of one run received, by optimizer step and in stream order."""

    keys: list[tuple[int, int, int]] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    """Digest of each global batch: of its rows in stream order, whichever rank and micro-batch they came in."""
    rows: list[int] = field(default_factory=list)
    """Samples of each row."""
    skipped: list[str] = field(default_factory=list)
    longest_wait_s: float = 0.0


def pull(
    config: Path,
    addresses: Sequence[str],
    *overrides: str,
    ranks: int = 1,
    epoch: int = 0,
    first_sample: int = 0,
    max_steps: int | None = None,
    split: str = "train",
    on_step: Any = None,
    pins: dict[str, str] | None = None,
) -> Pulled:
    """Pull an epoch as `ranks` ranks would. `on_step(step)` runs after each step of rank 0."""
    connect = f"cluster.loader_addresses=[{','.join(addresses)}]"
    loaded = load_config(config, [connect, f"trainer.epochs={epoch + 1}", *overrides])
    rows: list[dict[tuple[int, int], list[tuple[list[tuple[int, ...]], bytes]]]] = [{} for _ in range(ranks)]
    result, errors = Pulled(), []

    def one(rank: int) -> None:
        feed = Feed(loaded, split, rank, ranks, pins=pins)  # type: ignore[arg-type]
        try:
            feed.connect(epoch)
            for batch in feed.steps(epoch, first_sample):
                if max_steps is not None and batch.step >= max_steps:
                    break
                for a, micro in enumerate(batch.micro_batches):
                    rows[rank][batch.step, a] = list(_rows(micro))
                    result.skipped.extend(micro.skipped)
                result.longest_wait_s = max(result.longest_wait_s, batch.wait_s if batch.step else 0)
                if rank == 0 and on_step:
                    on_step(batch.step)
        except BaseException as error:  # noqa: BLE001 - raised again in the test's own thread
            errors.append(error)
        finally:
            feed.close()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive(), "a rank hangs"
    if errors:
        raise errors[0]
    for step, a in sorted({place for per_rank in rows for place in per_rank}):
        if len(result.steps) <= step:
            result.steps.append("")
        for rank in range(ranks):
            for keys, payload in rows[rank][step, a]:
                result.keys.extend(keys)  # type: ignore[arg-type]
                result.rows.append(len(keys))
                result.steps[step] = hashlib.sha256(result.steps[step].encode() + payload).hexdigest()
    return result


def _rows(micro: Any) -> Iterator[tuple[list[tuple[int, ...]], bytes]]:
    """(keys of its samples, content without padding) of each real row of a micro-batch."""
    image = sample = 0
    for row in range(micro.num_rows):
        length = int(micro.attention_mask[row].sum())
        images = int(micro.image_counts[row])
        keys = micro.sample_keys[sample : sample + micro.row_samples[row]]
        sample += len(keys)
        parts = [
            keys.tobytes(),
            micro.input_ids[row, :length].tobytes(),
            micro.labels[row, :length].tobytes(),
        ]
        if not np.isnan(micro.actions[row]).all():  # its shape is that of other rows where it has none
            parts.append(micro.actions[row].tobytes())
        if micro.positions is not None:
            parts.append(micro.positions[row, :length].tobytes())
        if images:
            parts.append(micro.pixels[image : image + images].tobytes())
        image += images
        yield [tuple(key) for key in keys.tolist()], b"".join(parts)


def wait_until(condition: Any, deadline_s: float, what: str) -> None:
    """Poll a condition with a deadline."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {deadline_s} s"
        time.sleep(0.02)
