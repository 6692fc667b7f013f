"""The evaluation `success`: how often the model succeeds in a simulator, measured during the training.

    trainer.evals:
      - {type: success, tasks: [PushCube-v1, PickCube-v1], episodes: 20, interval: 500}

At its step the model is exported to `{output_dir}/evals/success/step-XXXXXXXX/export`, as at the end of a run. Then one process
of `trainer.sim.evaluate` plays on the first rank's machine, and the ranks train on. Its figures are logged at the step that was
evaluated: `val/success_once`, `val/success_at_end`, `val/reward`, with several tasks also each task's own, a contact sheet and a
video. A step that is due while the evaluation before it still plays is left out, and the log says so; the last step never is.
The export is deleted afterwards; results.json, videos and the evaluator's log stay.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stoker_proto.config import Config
from stoker_proto.config.reader import read_section
from stoker_proto.config.rules import above, allowed, at_least
from stoker_proto.errors import ConfigError
from trainer.engine.ranks import max_over_ranks
from trainer.evals.interface import Eval, Moment, Outcome
from trainer.sim.evaluation.pictures import check_video
from trainer.sim.evaluation.seeds import check_held_out, jobs_of, read_seeds
from trainer.sim.tasks.registry import check_task, is_shipped, load_modules

log = logging.getLogger(__name__)

_CHECK_S = 0.5
"""Between two looks at the evaluator, at the end of the run."""
_END_S = 20.0
"""For the evaluator and its simulators to end after SIGTERM."""
_NOT_KNOWN = "whether the evaluation's seeds are held out is not known"
_KEY = "trainer.evals, type success"
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which the evaluator would take itself for a rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuccessOptions:
    """Options of an entry `{type: success}`; as those of `python -m trainer.sim.evaluate`, whose --help explains them."""

    tasks: tuple[str, ...]
    name: str = "success"
    """Of its figures, `val/{name}_once` and so on, and of its folder; a second entry needs another one."""
    episodes: int = field(default=20, metadata=at_least(1))
    """Of each task."""
    env_modules: tuple[str, ...] = ()
    processes: int = field(default=1, metadata=at_least(1))
    """Simulators at a time, about 0.8 GB each."""
    seed_start: int = field(default=1_000_000, metadata=at_least(0))
    image_size: int = field(default=128, metadata=at_least(1))
    """Pixels; as the pictures of the training data."""
    wrist_camera: bool = False
    """Show the camera on the hand too."""
    image_history: tuple[int, ...] | None = None
    """None: that of `data.options.image_history`."""
    state: str | None = None
    execute: int | None = field(
        default=None, metadata=allowed("at least 1, or null", lambda count: count is None or count >= 1)
    )
    max_steps: int | None = field(
        default=None, metadata=allowed("at least 1, or null", lambda count: count is None or count >= 1)
    )
    videos: int = field(default=1, metadata=at_least(0))
    """Of successes, and of failures, of each task."""
    most_deaths: int = field(default=3, metadata=at_least(0))
    device: str = "cpu"
    """Of the evaluator's model. On a GPU it shares memory with the first rank."""
    threads: int = field(default=1, metadata=at_least(1))
    deadline_s: float = field(default=7200.0, metadata=above(0))
    """An evaluation that takes longer is ended, and counts as failed."""


@dataclass(slots=True)
class _Running:
    """One evaluator process."""

    step: int
    folder: Path
    process: subprocess.Popen[bytes]
    deadline: float


class Success(Eval):
    """Plays in processes of its own, one evaluation at a time."""

    def __init__(self, options: Mapping[str, Any], config: Config) -> None:
        """Raises ConfigError, also for an unknown task, and for a simulator or PyAV that is not installed."""
        self._options = read_section(SuccessOptions, dict(options), _KEY)
        self._depth = config.data.image.depth
        history = config.data.options.get("image_history", (0,)) if self._options.image_history is None else None
        self._history = tuple(history or self._options.image_history or (0,))
        if not self._options.tasks:
            raise ConfigError(f"{_KEY}: tasks is empty: name at least one")
        if config.model.lora is not None and config.model.lora.export == "adapter":
            raise ConfigError(f"{_KEY}: it plays a whole model, and model.lora.export is adapter: set it to merged")
        load_modules(self._options.env_modules)
        for task in self._options.tasks:
            check_task(task)
            if is_shipped(task) and importlib.util.find_spec("mani_skill") is None:
                raise ConfigError(
                    f"{_KEY}: {task} needs ManiSkill: pip install 'stoker[sim]', then the renderer with: "
                    "STOKER_PYTHON=$(command -v python) sh trainer/sim/install_renderer.sh"
                )
        check_video(self._options.videos > 0)
        if os.environ.get("RANK", "0") == "0":
            self._check_seeds(config)
        self._running: _Running | None = None
        self._next: tuple[int, Path] | None = None
        """Step and folder of an exported model that waits for the evaluation before it."""
        self._num_failed = 0

    def _check_seeds(self, config: Config) -> None:
        """Raises ConfigError for a seed that the training data have; a warning where this cannot be known."""
        files = [Path(path) for path in config.data.paths("train")]
        readable = [file for file in files if file.suffix == ".jsonl" and file.is_file()]
        options = self._options
        try:
            note = check_held_out(read_seeds(readable), jobs_of(options.tasks, options.seed_start, options.episodes))
        except ConfigError as error:
            raise ConfigError(f"{_KEY}: {error} (seed_start)") from error
        if len(readable) < len(files):
            note = f"{len(files) - len(readable)} of the training data are no JSONL files on this machine: {note or _NOT_KNOWN}"
        if note:
            log.warning("%s: %s", _KEY, note)

    def begin(self, moment: Moment) -> None:
        """Export, and start the evaluator on the first rank."""
        [is_busy] = max_over_ranks([float(self._running is not None)], moment.ranks)
        if is_busy and not moment.is_last:
            log.warning(
                "step %d is not evaluated: the evaluation before it still plays; lengthen the interval, or raise processes",
                moment.step,
            )
            return
        folder = moment.output_dir / "evals" / self._options.name / f"step-{moment.step:08d}"
        if moment.ranks.is_first and folder.exists():
            shutil.rmtree(folder)  # of a run that was lost after this step
        moment.export(folder)
        if not moment.ranks.is_first:
            return
        if is_busy:
            self._next = moment.step, folder
        else:
            self._start(moment.step, folder)

    def finished(self) -> list[Outcome]:
        """The outcome of an evaluator that has ended."""
        running = self._running
        if running is None:
            return []
        code = running.process.poll()
        if code is None and time.monotonic() < running.deadline:
            return []
        if code is None:
            _end(running.process)
        self._running = None
        outcome = self._read(running, code)
        shutil.rmtree(running.folder / "export", ignore_errors=True)
        if self._next is not None:
            (step, folder), self._next = self._next, None
            self._start(step, folder)
        return [outcome]

    def wait(self) -> list[Outcome]:
        """Until nothing plays any more; each evaluation has its deadline."""
        found: list[Outcome] = []
        if self._running is not None:
            log.info("waiting for the evaluation of step %d", self._running.step)
        while self._running is not None:
            found += self.finished()
            if self._running is not None:
                time.sleep(_CHECK_S)
        return found

    def close(self) -> None:
        """End the evaluator; its simulators end with it."""
        if self._running is not None:
            _end(self._running.process)
        self._running = self._next = None

    def _start(self, step: int, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        if self._options.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with (folder / "log.txt").open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "trainer.sim.evaluate", *self._arguments(folder)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the run, which then ends it
            )
        self._running = _Running(step, folder, process, time.monotonic() + self._options.deadline_s)
        log.info("step %d: playing %d episodes of %s; log: %s", step, self._options.episodes, self._tasks, file.name)

    @property
    def _tasks(self) -> str:
        return ", ".join(self._options.tasks)

    def _arguments(self, folder: Path) -> list[str]:
        options = self._options
        given: dict[str, Any] = {
            "--model": folder / "export",
            "--out": folder,
            "--episodes": options.episodes,
            "--processes": options.processes,
            "--seed-start": options.seed_start,
            "--image-size": options.image_size,
            "--state": options.state,
            "--execute": options.execute,
            "--max-steps": options.max_steps,
            "--videos": options.videos,
            "--most-deaths": options.most_deaths,
            "--device": options.device,
            "--threads": options.threads,
            "--end-with": os.getpid(),
        }
        repeated = [("--task", task) for task in options.tasks] + [
            ("--env-module", name) for name in options.env_modules
        ]
        pairs = [*repeated, *((name, value) for name, value in given.items() if value is not None)]
        history = "--image-history=" + ",".join(map(str, self._history))
        return [str(part) for pair in pairs for part in pair] + [
            history,
            "--quiet",
            *(["--depth"] if self._depth else []),
            *(["--wrist-camera"] if self._options.wrist_camera else []),
        ]

    def _read(self, running: _Running, code: int | None) -> Outcome:
        """What the evaluator wrote; `code`: its exit code, None where it was ended at the deadline."""
        name = self._options.name
        if code != 0:
            self._num_failed += 1
            reason = (
                f"no end within {self._options.deadline_s:.0f} s"
                if code is None
                else _last_line(running.folder / "log.txt")
            )
            log.error(
                "the evaluation of step %d failed: %s; its log: %s", running.step, reason, running.folder / "log.txt"
            )
            return Outcome(step=running.step, figures={f"{name}_failures": float(self._num_failed)})
        tree = json.loads((running.folder / "results.json").read_text(encoding="utf-8"))
        found = figures_of(tree["summary"]["model"]) | {"deaths": float(len(tree["deaths"]))}
        figures = {
            key if key.startswith("reward") and name == "success" else f"{name}_{key}": found[key] for key in found
        }
        videos = sorted((running.folder / "videos").glob("*.mp4"))
        media = {f"{name}_sheet": running.folder / "contact_sheet.png"} | {
            f"{name}_video/{path.stem}": path for path in videos
        }
        line = f"success once {found['once']:.1%}, at the end {found['at_end']:.1%}"
        return Outcome(
            step=running.step,
            figures=figures,
            media=media,
            line=f"{line} of {found['episodes']:.0f} episodes of {self._tasks}",
        )


def figures_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """Means over the tasks, each task the same weight; with several tasks also each one's own. summary: task -> its figures.

    {"PushCube-v1": {"episodes": 20, "success_once": {"value": 0.9, ...}, ...}} -> {"episodes": 20.0, "once": 0.9, ...}
    """
    found: dict[str, float] = {"episodes": float(sum(task["episodes"] for task in summary.values()))}
    for name, key in (("once", "success_once"), ("at_end", "success_at_end"), ("reward", "reward")):
        values = {
            task: float(of_task[key]["value"] if name != "reward" else of_task[key])
            for task, of_task in summary.items()
        }
        found[name] = sum(values.values()) / len(values)
        if len(values) > 1:
            found |= {f"{name}/{task}": value for task, value in values.items()}
    return found


def _last_line(file: Path) -> str:
    lines = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it wrote nothing"


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, at which it ends its simulators, then SIGKILL."""
    process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
