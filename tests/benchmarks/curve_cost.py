"""What encryption costs: CPU seconds per GB over the loopback, with CURVE and without, in interleaved rounds of one run.

Frames of the size of a piece go from a ROUTER to a DEALER, both in this process, so its CPU time is that of both sides.

    python tests/benchmarks/curve_cost.py [--gigabytes 2] [--frame-kb 170] [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from pathlib import Path

import zmq

_CREDITS = 32


def main() -> None:
    """Run all rounds and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="in each round; default: %(default)s")
    parser.add_argument("--frame-kb", type=int, default=170, help="8 samples of 21 KB by default: a piece")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved; medians are shown; default: %(default)s")
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    frame = bytes(arguments.frame_kb * 1000)
    count = max(1, round(arguments.gigabytes * 1e9 / len(frame)))
    rounds: dict[str, list[dict[str, float]]] = {"clear": [], "curve": []}
    for _ in range(arguments.rounds):
        for kind, figures in rounds.items():
            figures.append(measure(frame, count, encrypted=kind == "curve"))
    median = {
        kind: {name: statistics.median(figure[name] for figure in figures) for name in figures[0]}
        for kind, figures in rounds.items()
    }
    extra = median["curve"]["cpu_s_per_gb"] - median["clear"]["cpu_s_per_gb"]
    for kind, figure in median.items():
        print(f"{kind}: {figure['cpu_s_per_gb']:.2f} CPU s per GB, {figure['gb_per_s']:.2f} GB/s")
    print(
        f"CURVE costs {extra:.2f} CPU s per GB over both sides, "
        f"{median['curve']['cpu_s_per_gb'] / median['clear']['cpu_s_per_gb']:.1f}x of the wire alone "
        f"({arguments.frame_kb} KB frames, medians of {arguments.rounds} interleaved rounds of {count * len(frame) / 1e9:.1f} GB)"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({**median, "extra_cpu_s_per_gb": extra}, indent=1))


def measure(frame: bytes, count: int, *, encrypted: bool) -> dict[str, float]:
    """CPU seconds and rate of `count` frames, each sent for a credit."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as dealer:
        router.linger = dealer.linger = 0
        if encrypted:
            public, secret = zmq.curve_keypair()
            router.curve_secretkey, router.curve_publickey, router.curve_server = secret, public, True
            dealer.curve_publickey, dealer.curve_secretkey = zmq.curve_keypair()
            dealer.curve_serverkey = public
        port = router.bind_to_random_port("tcp://127.0.0.1")
        dealer.connect(f"tcp://127.0.0.1:{port}")
        dealer.send(b"hello")
        router.recv_multipart()
        thread = threading.Thread(target=_serve, args=(router, frame, count))
        cpu, wall = time.process_time(), time.perf_counter()
        thread.start()
        for _ in range(_CREDITS):
            dealer.send(b"ticket")
        for _ in range(count):
            dealer.recv(copy=False)
            dealer.send(b"ticket")
        thread.join()
        gigabytes = count * len(frame) / 1e9
        return {
            "cpu_s_per_gb": (time.process_time() - cpu) / gigabytes,
            "gb_per_s": gigabytes / (time.perf_counter() - wall),
        }


def _serve(router: zmq.Socket[bytes], frame: bytes, count: int) -> None:
    for _ in range(count):
        address, _ = router.recv_multipart()
        router.send(address, zmq.SNDMORE)
        router.send(frame)


if __name__ == "__main__":
    main()
