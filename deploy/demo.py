"""`make demo`: two loaders read ManiSkill demonstrations, two DeepSpeed ZeRO-3 ranks train a policy on their batches.

Where the simulator is installed (`pip install -e '.[sim]'` and a renderer), the policy then plays 20 held-out episodes.
Every step is a command that you could type yourself; it is printed before it runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # `python deploy/demo.py` puts deploy/ first on the path; the source root belongs there
    sys.path[0] = str(ROOT)

from deploy.child import interrupt_on_sigterm, run_command  # noqa: E402  (the path must stand before)

CONFIG = "deploy/configs/demo.yaml"
MODEL = "build/demo/policy"
OUTPUT = "outputs/demo"
VAL = "tests/data/pushcube/val.jsonl"
TINY = f"--family robot --image-size 72 --num-views 1 --out {MODEL}".split()
PREDICTIONS = f"--model {OUTPUT}/export --data {VAL} --out {OUTPUT}/predictions.png".split()
EVALUATION = (
    f"--model {OUTPUT}/export --task PushCube-v1 --episodes 20 --image-size 96 --state state --out {OUTPUT}/evaluation"
).split()

LOAD_EXPORT = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1])
count = sum(p.numel() for p in model.parameters())
print(f"{type(model).__name__} with {count:,} parameters and {type(processor).__name__} loaded from {sys.argv[1]}")
"""


def main() -> int:
    """Build the model, prepare the data, train, load the exported model, show the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=v", help="override a key of the demo's config"
    )
    arguments = parser.parse_args()
    overrides = [part for override in arguments.set for part in ("--set", override)]
    interrupt_on_sigterm()
    started = time.monotonic()
    shutil.rmtree(ROOT / OUTPUT, ignore_errors=True)  # the demo starts anew; a real run resumes
    python = sys.executable
    steps = [
        (
            "A small random policy: images and an instruction in, action tokens out",
            [python, "-m", "trainer.models.tiny", *TINY],
        ),
        (
            "Scan the demonstrations, fit the action codec",
            [python, "-m", "loader_service.cli", "prepare", "--config", CONFIG, *overrides],
        ),
        ("Two loaders, two DeepSpeed ZeRO-3 ranks", [python, "deploy/launch.py", "--config", CONFIG, *overrides]),
        ("The exported model in a fresh process", [python, "-c", LOAD_EXPORT, f"{OUTPUT}/export"]),
        ("What it answers to frames it has never seen", [python, "-m", "trainer.examples.predictions", *PREDICTIONS]),
    ]
    if can_simulate():
        evaluation = [python, "-m", "trainer.sim.evaluate", *EVALUATION]
        steps.append(("Closed loop: 20 held-out episodes in the simulator", evaluation))
    for number, (title, command) in enumerate(steps, 1):
        shown = shlex.join(part if "\n" not in part else "..." for part in ["python", *command[1:]])
        print(f"\n=== {number}/{len(steps)} {title}\n$ {shown}", flush=True)
        try:
            code = run_command(command, ROOT)
        except KeyboardInterrupt:
            print("demo: interrupted; it starts anew next time", file=sys.stderr)
            return 130
        if code:
            print(f"demo: step {number} ended with code {code}", file=sys.stderr)
            return code
    summary = json.loads((ROOT / OUTPUT / "summary.json").read_text())
    print(f"\n=== Results ({time.monotonic() - started:.0f} s)")
    print(describe(summary, ROOT / OUTPUT / "tensorboard"))
    print(f"TensorBoard: tensorboard --logdir {OUTPUT}/tensorboard")
    print(f"pictures of what it answers: {OUTPUT}/predictions.png")
    if can_simulate():
        print(f"videos and pictures of the episodes: {OUTPUT}/evaluation")
    else:
        print(
            "for its success in closed loop: pip install -e '.[sim]', a renderer (trainer/sim/README.md), make demo again"
        )
    return 0


def can_simulate() -> bool:
    """Whether ManiSkill is installed."""
    return importlib.util.find_spec("mani_skill") is not None


def describe(summary: dict[str, Any], events: Path) -> str:
    """The run's validations side by side, from its TensorBoard events, and how long the ranks waited for data."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(events))
    reader.Reload()
    columns = (
        "train/loss",
        "val/perplexity",
        "val/accuracy",
        "val/action_mae_free/mean",
        "val/action_mae_constant/mean",
    )
    series = {name: {event.step: event.value for event in reader.Scalars(name)} for name in columns}
    lines = [f"{'step':>6}" + "".join(f"{name:>30}" for name in columns)]
    first = min(series["train/loss"])
    for step in sorted({first, *series["val/perplexity"]}):
        cells = [f"{series[name][step]:>30.4f}" if step in series[name] else f"{'':>30}" for name in columns]
        lines.append(f"{step:>6}" + "".join(cells))
    lines.append(
        f"time spent waiting for data, worst rank: {100 * summary['data_wait_frac']:.2f}% of {summary['seconds']:.0f} s"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
