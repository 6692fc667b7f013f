"""What a ticket costs a loader in Python, by thread and function: counts that know no clock.

    python tests/benchmarks/ticket_work.py [--top 40] [--bytecodes] [--trajectories 32]

A loader serves an epoch to a rank, both in this process, over a real socket. Profilers of Python count the calls of its serving
thread and of its builder threads; with --bytecodes, in a second epoch of a new loader, what the interpreter executes. Frames have
64 pixels a side: their size changes no count. What is still noise: how many messages a wake-up finds (1 to 3%).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import zmq

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "proto"), str(Path(__file__).parent)]

from synthetic import write_trajectories  # noqa: E402 - found through the line above

from loader_service.pieces.encoder import RecordEncoder  # noqa: E402
from loader_service.pieces.excluded import Excluded  # noqa: E402
from loader_service.prepare.run import prepare  # noqa: E402
from loader_service.server.command import all_fingerprints  # noqa: E402
from loader_service.server.pool import InlinePool  # noqa: E402
from loader_service.server.served import Served  # noqa: E402
from loader_service.server.server import LoaderServer  # noqa: E402
from stoker_proto import PROTOCOL_VERSION  # noqa: E402
from stoker_proto.config import Config, OrderConfig  # noqa: E402
from stoker_proto.order.lanes import Order  # noqa: E402
from stoker_proto.processor import Processor  # noqa: E402
from stoker_proto.wire.encoding import decode, encode  # noqa: E402
from stoker_proto.wire.messages import Epoch, Hello, Lanes, Piece, Ticket, Welcome  # noqa: E402
from tests.tiny_models import make_config, write_model_folder  # noqa: E402

LENGTH, SIZE, THREADS = 50, 64, 2
BATCH, WINDOW = 32, 16
"""Stream positions of a micro-batch, and tickets that are open at a time."""
Counts = dict[str, Counter[str]]
"""Thread -> function -> number."""


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=32, help="of 50 frames; default: %(default)s")
    parser.add_argument("--top", type=int, default=40, help="functions shown of each thread; default: %(default)s")
    parser.add_argument("--bytecodes", action="store_true", help="count these too: takes minutes")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as name:
        config = make_data(Path(name), arguments.trajectories)
        for what, install in {"calls": count_calls, "bytecodes": count_bytecodes}.items():
            if what == "calls" or arguments.bytecodes:
                counts: Counts = {}
                (Path(name) / what).mkdir()
                tickets = epoch(config, Path(name) / what, install(counts))
                show(what, counts, tickets, arguments.trajectories * LENGTH, arguments.top)


def make_data(folder: Path, num: int) -> Config:
    """The config of a run over new trajectories."""
    jsonl = write_trajectories(folder / "data", num=num, length=LENGTH, size=SIZE, deflated=False)
    (folder / "model").mkdir()
    write_model_folder(folder / "model", "llava", image_size=SIZE)
    return make_config(
        folder / "model", f"data.train_data_paths=[{jsonl}]", f"data.cache_dir={folder / 'cache'}",
        "data.action.codec=bins",
    )  # fmt: skip


def epoch(config: Config, folder: Path, counting: AbstractContextManager[None]) -> int:
    """Serve one epoch; the number of its tickets. counting: counts in the threads that start within it."""
    prepared = prepare(config, splits=("train",))
    processor = Processor.build(config, prepared.codec)
    tokens = {"train": dict.fromkeys(prepared.entries["train"], 0)}
    excluded = Excluded.read(config.data)
    fingerprints = all_fingerprints(config, prepared, processor, excluded)
    served = Served(config, prepared.entries, fingerprints, processor.to_json(), tokens)
    served.write_job(folder, processor, excluded, 1, THREADS)
    RecordEncoder(config.data, processor).encode(prepared.entries["train"][0], 0, 0)  # imports are not counted
    with zmq.Context() as context:
        pool = InlinePool(folder, THREADS)
        server = LoaderServer(served, folder, pool, context)
        server.plan_ahead()
        address = server.bind("tcp://127.0.0.1:*")
        with counting:
            pool.start(60)
            serving = threading.Thread(target=server.run, name="serve")
            serving.start()
        try:
            return pull(context, address)
        finally:
            server.stop()
            serving.join()
            server.close()
            pool.stop()


def pull(context: zmq.Context[zmq.Socket[bytes]], address: str) -> int:
    """Be a rank through one epoch, with WINDOW open tickets. Returns the number of tickets."""
    with context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, 600_000)
        socket.connect(address)
        socket.send(encode(Hello(protocol=PROTOCOL_VERSION, client="count", rank=0, world_size=1, fingerprints={})))
        assert isinstance(decode(socket.recv()), Welcome)
        socket.send(encode(Epoch(split="train", epoch=0, entries=[0])))
        lanes = decode(socket.recv())
        assert isinstance(lanes, Lanes)
        order = Order(lanes.lengths[0], OrderConfig().cell, lanes.starts[0])
        runs = [
            run for start in range(0, order.total, BATCH) for run in order.runs(start, min(start + BATCH, order.total))
        ]
        for number, run in enumerate(runs):
            if number >= WINDOW:
                assert isinstance(decode(socket.recv()), Piece)
            socket.send(
                encode(Ticket(ticket=number, split="train", epoch=0, lane=run.lane, start=run.start, count=run.count))
            )
        for _ in range(min(WINDOW, len(runs))):
            assert isinstance(decode(socket.recv()), Piece)
    return len(runs)


@contextmanager
def count_calls(counts: Counts) -> Iterator[None]:
    """Threads that start in the block count calls of Python functions and, as `library`, of functions in C."""

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        of_thread = counts.setdefault(threading.current_thread().name, Counter())
        if event == "call":
            of_thread[named(frame)] += 1
        elif event == "c_call":
            of_thread["library"] += 1

    threading.setprofile(profile)
    try:
        yield
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]


@contextmanager
def count_bytecodes(counts: Counts) -> Iterator[None]:
    """Threads that start in the block count bytecodes."""

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            counts.setdefault(threading.current_thread().name, Counter())[named(frame)] += 1
        return trace

    threading.settrace(trace)
    try:
        yield
    finally:
        threading.settrace(None)  # type: ignore[arg-type]


def named(frame: FrameType) -> str:
    """File and function."""
    code = frame.f_code
    file = code.co_filename.removeprefix(f"{ROOT}/")
    return f"{file.split('site-packages/')[-1]}:{code.co_qualname}"


def show(what: str, counts: Counts, tickets: int, samples: int, top: int) -> None:
    """The sums of the serving thread and of all builder threads per ticket, and the functions with most."""
    print(f"{what}: {tickets} tickets, {samples} samples")
    sums: Counts = {"serve": Counter(), "build": Counter()}
    for thread, found in counts.items():
        if thread.split("-")[0] in sums:
            sums[thread.split("-")[0]].update(found)
    for thread, found in sums.items():
        library = found.pop("library", 0)
        print(f"{thread}: {found.total() / tickets:,.1f} {what} per ticket, {library / tickets:,.1f} of libraries")
        for name, number in found.most_common(top):
            print(f"    {number / tickets:9.2f}  {name}")


if __name__ == "__main__":
    main()
