"""`make success`: demonstrations -> loaders and ZeRO ranks -> export -> closed-loop success, with a table and a page of videos.

    python deploy/success.py                                       four tasks, 100 held-out episodes each
    python deploy/success.py --task PushCube-v1 --demonstrations 100 --rounds 1 --samples 60000 --episodes 30

Every step is a command that you could type yourself; it is printed before it runs. The same command resumes: demonstrations that
are complete are kept, training resumes from its newest checkpoint, and evaluation plays the episodes that are missing. In
the second round the policy of the first acts while the expert labels (DAgger), and training goes on with these episodes too.
With --overlap these episodes are collected while the first round is still training, by the policy of its newest checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import html
import json
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # `python deploy/success.py` puts deploy/ first on the path; the source root belongs there
    sys.path[0] = str(ROOT)

from deploy.beside import run_beside  # noqa: E402  (the path must stand before)
from deploy.child import interrupt_on_sigterm, run_command  # noqa: E402

TASKS = {
    "PushCube-v1": 0.15,
    "PullCube-v1": 0.12,
    "PickCube-v1": 0.28,
    "StackCube-v1": 0.45,
    "StackGreenOnRed-v1": 0.45,
}
"""Task -> its share of the training: the harder, the more. Shares are relative to those of the other tasks."""
DEFAULT_TASKS = ("PushCube-v1", "PullCube-v1", "PickCube-v1", "StackCube-v1")
"""StackGreenOnRed-v1 has the scene of StackCube-v1 with the other instruction: trainer/sim/README.md."""
SAME_SCENE = ("StackCube-v1", "StackGreenOnRed-v1")
TRAIN_SEED, VAL_SEED, DAGGER_SEED = 10_000, 500_000, 600_000
"""First simulator seeds of the demonstrations with `--seed 0`; the evaluation's begin at 1,000,000."""
SEEDS = range(10)
"""What `--seed` may be. Each value moves the first seeds above by SEED_STRIDE, so that no range reaches the next one."""
SEED_STRIDE = 1000
PART = 50
"""Demonstrations that are collected by one command: at most so many are lost when it is stopped."""
IMAGE_SIZE = 256
SIGMA_BINS = {"bins": 3, "vq": 0.5}
"""Codec -> `trainer.loss.sigma_bins`."""
LEARNED = ("codec.json", "state.json")
"""Files in the folder of a run that decide the meaning of the tokens that its model has learned."""
RENDERER = "STOKER_PYTHON=$(command -v python) sh trainer/sim/install_renderer.sh"


@dataclass(frozen=True, slots=True)
class Step:
    """One command, and the file that says that it is done."""

    title: str
    command: Sequence[str]
    done: Path | None = None
    """Made by `run` after the command; a step whose file exists is left out. None: the command itself resumes."""
    beside: Sequence[Collection] = ()
    """What is collected while this training runs, by the policy of its newest checkpoint."""


NUMBERS = (
    ("--demonstrations", 300, "N", "demonstrations of each task"),
    ("--validation", 10, "N", "demonstrations of each task that are held out"),
    ("--samples", 300_000, "N", "samples to train on in the last round; each round before it takes two thirds"),
    ("--rounds", 2, "N", "rounds of training; from the second on with DAgger"),
    ("--dagger-episodes", 300, "N", "of each round, shared among the tasks as training is: the harder, the more"),
    (
        *("--checkpoint-interval", 500, "STEPS"),
        "an interrupted training loses at most so many; with --overlap the first policy acts after so many",
    ),
    ("--episodes", 100, "N", "of each task to evaluate"),
    ("--processes", 2, "N", "simulators at a time"),
    ("--ranks", 2, "N", "trainer ranks"),
    ("--loaders", 1, "N", "loader servers"),
)
"""Options that are whole numbers of at least 1: name, default, what stands for the value, help."""


def main() -> int:
    """Run all steps; returns the exit code."""
    options = parse()
    interrupt_on_sigterm()
    try:
        return _run_all(options)
    except KeyboardInterrupt:
        print("success: interrupted; the same command resumes", file=sys.stderr)
        return 130


def _run_all(options: argparse.Namespace) -> int:
    options.work.mkdir(parents=True, exist_ok=True)
    if options.start is not None:
        for name in LEARNED:
            shutil.copyfile(options.start / name, options.work / name)
    started = time.monotonic()
    for number in range(options.rounds):
        for step in steps_of_round(options, number):
            if code := run(step) if not step.beside else run_with_collectors(step, options, number):
                print(f"success: {step.title} ended with code {code}; the same command resumes", file=sys.stderr)
                return code
    results = json.loads((options.work / "evaluation" / "results.json").read_text())
    page = options.work / "evaluation" / "index.html"
    page.write_text(page_of(results, sorted(file.name for file in page.parent.glob("videos/*.mp4"))))
    print(f"\n{page}, after {(time.monotonic() - started) / 60:.0f} minutes")
    return 0


def steps_of_round(options: argparse.Namespace, number: int) -> list[Step]:
    """The steps of one round; the last round is followed by the evaluation."""
    work: Path = options.work
    base = work / f"round-{number - 1}" / "export" if number else start_of(options)
    config = work / f"round-{number}.yaml"
    write_config(options, number, base, config)
    python = sys.executable
    steps = (
        collecting(options)
        if number == 0
        else [part.step(options, work / f"round-{number - 1}" / "export") for part in dagger(options, number)]
    )
    if number == 0 and options.start is None:
        robot = [python, "-m", "trainer.models.tiny", "--family", "robot", "--image-size", "72", "--out", str(base)]
        robot += ["--seed", str(options.seed)]
        if set(SAME_SCENE) <= set(options.task):  # the order of words alone tells these tasks apart
            robot += ["--word-window", "5"]
        steps.append(Step("A small random policy", robot, base / ".done"))
        out = ["--codec-out", str(work / "codec.json"), "--state-out", str(work / "state.json")]
        prepare = [python, "-m", "loader_service.cli", "prepare", "--config", str(config), *out]
        steps.append(Step("Scan the demonstrations, fit codec and state scale", prepare))
    trained = [python, "deploy/launch.py", "--config", str(config)]
    beside = dagger(options, number + 1) if options.overlap and number + 1 < options.rounds else []
    done = work / f"round-{number}" / ".done"
    steps.append(Step(f"Loaders and ZeRO ranks, round {number}", trained, done, beside))
    if number == options.rounds - 1:
        steps.append(Step("Closed loop on held-out seeds", evaluating(options, work / f"round-{number}" / "export")))
    return steps


def collecting(options: argparse.Namespace) -> list[Step]:
    """Demonstrations of each task in parts, and a few for validation."""
    steps = []
    moved = SEED_STRIDE * options.seed
    for task in options.task:
        for first in range(0, options.demonstrations, PART):
            num = min(PART, options.demonstrations - first)
            part = Collection(task, f"part-{first:05d}", TRAIN_SEED + moved + 2 * first, num)
            steps.append(part.step(options))
        steps.append(Collection(task, "val", VAL_SEED + moved, options.validation).step(options))
    return steps


def dagger(options: argparse.Namespace, number: int) -> list[Collection]:
    """Episodes in which a policy of the round before acts."""
    seed = DAGGER_SEED + 10_000 * number + SEED_STRIDE * options.seed
    share = options.dagger_episodes / sum(TASKS[task] for task in options.task)
    return [Collection(task, f"dagger-{number}", seed, max(1, round(share * TASKS[task]))) for task in options.task]


@dataclass(frozen=True, slots=True)
class Collection:
    """One call of the collector."""

    task: str
    name: str
    seed: int
    num: int

    def step(self, options: argparse.Namespace, policy: Path | None = None) -> Step:
        """Its command. What an interrupted one left is removed first: its seeds would be written twice."""
        out = options.work / "data" / self.task
        done = out / f".{self.name}.done"
        if not done.exists():
            shutil.rmtree(out / self.name, ignore_errors=True)
            (out / f"{self.name}.jsonl").unlink(missing_ok=True)
        command = [
            *(sys.executable, "-m", "trainer.sim.collect", "--task", self.task, "--num", str(self.num)),
            *("--seed", str(self.seed), "--name", self.name, "--out", str(out), "--image-size", str(IMAGE_SIZE)),
            *("--noise", "0.75", "--render-share", "0.5", "--settle", "6", "--paraphrases", "--format", "stored"),
            *("--processes", str(options.processes)),
            *([] if policy is None else ["--policy", str(policy)]),
        ]
        return Step(f"{self.num} demonstrations of {self.task} ({self.name})", command, done)


def evaluating(options: argparse.Namespace, export: Path) -> list[str]:
    """The evaluator's command."""
    tasks = [part for task in options.task for part in ("--task", task)]
    return [
        *(sys.executable, "-m", "trainer.sim.evaluate", "--model", str(export), *tasks, "--state", "state"),
        *("--image-size", str(IMAGE_SIZE), "--episodes", str(options.episodes), "--processes", str(options.processes)),
        *("--out", str(options.work / "evaluation")),
    ]


def start_of(options: argparse.Namespace) -> Path:
    """The model that the first round starts from: a random one, or the newest of another run. Raises SystemExit."""
    if options.start is None:
        return Path(options.work / "model")
    exports = sorted(options.start.glob("round-*/export"), key=lambda export: int(export.parent.name.partition("-")[2]))
    if not exports:
        raise SystemExit(f"success: --from {options.start}: no round of it has an export; finish that run first")
    return Path(exports[-1])


def write_config(options: argparse.Namespace, number: int, base: Path, path: Path) -> None:
    """The round's YAML: the shipped recipe with this run's paths and sizes."""
    tree = yaml.safe_load((ROOT / "deploy" / "configs" / "success.yaml").read_text())
    work: Path = options.work
    tree["model"]["base_model_path"] = str(base)
    data = tree["data"]
    kind, dataset_options = data.pop("dataset_type"), data.pop("options")
    del data["train_data_paths"], data["val_data_paths"]  # those of a single source
    data["sources"] = [
        {
            "dataset_type": kind,
            "name": task,
            "paths": training_paths(options, number, task),
            "val_paths": [str(work / "data" / task / "val.jsonl")],
            "options": copy.deepcopy(dataset_options),  # YAML would write one object as an alias
            **({"weight": TASKS[task]} if len(options.task) > 1 else {}),
        }
        for task in options.task
    ]
    tree["data"]["action"]["codec"] = options.codec
    tree["trainer"]["loss"]["sigma_bins"] = SIGMA_BINS[options.codec]
    tree["data"]["cache_dir"] = str(work / "manifests")
    tree["data"]["order"] = {"seed": options.seed}
    tree["trainer"]["seed"] = options.seed
    if number or options.start is not None:  # the tokens that the model has learned
        tree["data"]["action"]["codec_path"] = str(work / "codec.json")
        tree["data"]["state_path"] = str(work / "state.json")
    tree["trainer"]["output_dir"] = str(work / f"round-{number}")
    samples = options.samples if number == options.rounds - 1 else options.samples * 2 // 3
    tree["trainer"]["max_steps"] = max(1, samples // tree["trainer"]["global_batch_size"])
    tree["trainer"]["checkpoint"]["interval"] = options.checkpoint_interval
    tree["cluster"]["component_placement"] = {
        "trainer": f"0-{options.ranks - 1}",
        "dataloader": f"0-{options.loaders - 1}",
    }
    tree["trainer"]["micro_batch_size"] = tree["trainer"]["global_batch_size"] // options.ranks
    path.write_text(
        f"# Written by deploy/success.py from deploy/configs/success.yaml.\n{yaml.safe_dump(tree, sort_keys=False)}"
    )


def training_paths(options: argparse.Namespace, number: int, task: str) -> list[str]:
    """All JSONL files of a task that the round trains on."""
    folder = options.work / "data" / task
    parts = [f"part-{first:05d}" for first in range(0, options.demonstrations, PART)]
    return [str(folder / f"{name}.jsonl") for name in [*parts, *(f"dagger-{n}" for n in range(1, number + 1))]]


def run(step: Step) -> int:
    """Run a step that is not done yet; returns its exit code."""
    if step.done is not None and step.done.exists():
        print(f"\n=== {step.title}: done before", flush=True)
        return 0
    print(f"\n=== {step.title}\n$ {shlex.join(['python', *step.command[1:]])}", flush=True)
    code = run_command(step.command, ROOT)
    if code == 0 and step.done is not None:
        step.done.parent.mkdir(parents=True, exist_ok=True)
        step.done.touch()
    if code and "trainer.sim" in step.command:
        print(f"the simulator needs `pip install 'stoker[sim]'` and a renderer: {RENDERER} (as root)", file=sys.stderr)
    return code


def run_with_collectors(step: Step, options: argparse.Namespace, number: int) -> int:
    """Run a training and its collectors side by side; those that are done are left out. Returns the first exit code but 0."""
    steps = [part.step(options, Path("POLICY")) for part in step.beside]  # also clears what an interrupted one left
    missing = [
        (part, one) for part, one in zip(step.beside, steps, strict=True) if not (one.done and one.done.exists())
    ]
    if not missing or (step.done is not None and step.done.exists()):
        return run(step)
    print(f"\n=== {step.title}, with {len(missing)} collections beside it", flush=True)
    print(f"$ {shlex.join(['python', *step.command[1:]])}", flush=True)

    def command_of(part: Collection, policy: Path) -> Sequence[str]:
        command = part.step(options, policy).command
        print(f"\n=== beside: {part.num} episodes of {part.task}\n$ {shlex.join(['python', *command[1:]])}", flush=True)
        return command

    jobs = [partial(command_of, part) for part, _ in missing]
    code, codes = run_beside(step.command, options.work / f"round-{number}", jobs, ROOT)
    for (_, one), ended in zip(missing, codes, strict=False):
        if ended == 0 and one.done is not None:
            one.done.touch()
    if code == 0 and step.done is not None:
        step.done.touch()
    return code or next((ended for ended in codes if ended), 0)


def page_of(results: Mapping[str, Any], videos: Sequence[str]) -> str:
    """The page: a table of success with intervals, and the videos."""
    rows = []
    for task, figures in results["summary"]["model"].items():
        steps = figures["steps_to_success"]
        cells = [task, figures["episodes"], _rate(figures["success_once"]), _rate(figures["success_at_end"])]
        cells.append("-" if steps is None else f"{steps:.1f}")
        rows.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>")
    shown = "".join(
        f'<figure><video src="videos/{html.escape(name)}" controls muted loop width="256"></video>'
        f"<figcaption>{html.escape(name)}</figcaption></figure>"
        for name in videos
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Closed-loop success</title>
<style>body{{font-family:sans-serif;margin:2em}}td,th{{padding:.3em 1em;text-align:right}}
figure{{display:inline-block}}</style></head>
<body><h1>Closed-loop success</h1>
<p>Held-out seeds; [low, high]: Wilson's 95% interval. At the end: 10 steps after the first success, or at the limit.</p>
<table><tr><th>task</th><th>episodes</th><th>success once</th><th>at the end</th><th>steps to success</th></tr>
{"".join(rows)}</table>
{shown}</body></html>
"""


def _rate(rate: Mapping[str, float]) -> str:
    return f"{100 * rate['value']:.1f}% [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    options.task = list(dict.fromkeys(options.task or DEFAULT_TASKS))
    options.work = options.work.resolve()
    if options.start is not None:
        options.start = options.start.resolve()
        for name in LEARNED:
            if not (options.start / name).is_file():
                parser.error(f"--from {options.start}: there is no {name}; name the --work of a finished run")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    work = "everything is written here (default %(default)s)"
    add("--work", type=Path, default=Path("outputs/success"), metavar="DIR", help=work)
    tasks = f"repeat for several; default: {', '.join(DEFAULT_TASKS)}, one model for all"
    add("--task", action="append", choices=list(TASKS), help=tasks)
    start = "train on from the model of another run (its --work), with its codec and scale of the state"
    add("--from", dest="start", type=Path, metavar="DIR", help=start)
    add("--codec", choices=list(SIGMA_BINS), default="bins", help="of the actions (default %(default)s)")
    seed = (
        "another one gives other demonstrations, weights and orders; the evaluation plays the same episodes (default 0)"
    )
    add("--seed", type=int, default=0, choices=SEEDS, metavar="0-9", help=seed)
    add("--overlap", action="store_true", help="collect the episodes of DAgger while the round before still trains")
    for name, default, metavar, text in NUMBERS:
        add(name, type=_positive, default=default, metavar=metavar, help=f"{text} (default {default})")
    return parser


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
