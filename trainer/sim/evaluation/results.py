"""The JSON of an evaluation: written after each episode, so that the same command resumes where it stopped.

    {"format": 1,
     "setup": {"rendering": {...}, "env_modules": [...], "settle_steps": 10, "versions": {...}},
     "models": {"model": {"path": "outputs/export", "fingerprint": "5b1c...", "protocol": {"execute": 1, ...}}, "other": {...}},
     "environments": {"PushCube-v1": {"cameras": ["base_camera"], "control_mode": "pd_ee_delta_pose", ...}},
     "deaths": [{"model": "model", "task": "PushCube-v1", "seed": 7, "reason": "the process ended by SIGSEGV"}],
     "episodes": [{"model": "model", "task": "PushCube-v1", "seed": 0, "success_once": true, ...}],
     "summary": {...}, "comparison": [...]}

A run resumes only if the setup, the fingerprints and the protocols are equal: episodes that were played otherwise are not mixed.
An episode whose simulator died has no result; the next run plays it again.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stoker_proto.errors import ConfigError
from stoker_proto.host.files import write_whole
from trainer.sim.evaluation.episode import EpisodeResult, Job
from trainer.sim.evaluation.rollout import Lost
from trainer.sim.evaluation.simulators import Facts

FORMAT = 1
FILE = "results.json"
_SIMULATOR_PACKAGES = ("mani_skill", "sapien", "numpy")
"""Whose versions may change what an episode looks like."""


class Results:
    """The results of one folder, those of earlier runs included."""

    def __init__(self, folder: Path, setup: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]) -> None:
        """models: label -> {path, fingerprint, protocol}. Raises ConfigError for a file of another setup or model."""
        self.path = folder / FILE
        self._tree: dict[str, Any] = {"format": FORMAT, "setup": _plain(setup), "models": {}, "environments": {}}
        self._tree |= {"deaths": [], "episodes": []}
        if self.path.exists():
            self._tree = self._read(_plain(setup), _plain(models))
        self._tree["models"] |= _plain(models)
        folder.mkdir(parents=True, exist_ok=True)
        self.write()

    def of(self, label: str) -> list[EpisodeResult]:
        """The finished episodes of a model."""
        return [_episode(row) for row in self._tree["episodes"] if row["model"] == label]

    def missing(self, label: str, jobs: Iterable[Job]) -> list[Job]:
        """Those of the jobs that the model has not finished."""
        done = {(result.task, result.seed) for result in self.of(label)}
        return [job for job in jobs if (job.task, job.seed) not in done]

    def add(self, label: str, outcome: EpisodeResult | Lost) -> None:
        """Keep what came of one episode."""
        if isinstance(outcome, Lost):
            death = {"task": outcome.job.task, "seed": outcome.job.seed, "reason": outcome.reason}
            self._tree["deaths"].append({"model": label, **death})
        else:
            self._tree["episodes"].append({"model": label, **asdict(outcome)})
        self.write()

    def add_environments(self, facts: Mapping[str, Facts]) -> None:
        """Keep what the environments said of themselves; facts by task."""
        self._tree["environments"] |= _plain({task: asdict(of_task) for task, of_task in facts.items()})
        self.write()

    def conclude(self, **parts: Any) -> None:
        """Add what is computed from all episodes."""
        self._tree |= _plain(parts)
        self.write()

    def write(self) -> None:
        """A reader sees the old file or all of the new one."""
        text = json.dumps(self._tree, indent=1, allow_nan=False)
        write_whole(self.path, text.encode())

    def _read(self, setup: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        try:
            tree: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            if tree["format"] != FORMAT:
                raise ConfigError(
                    f"{self.path} has format {tree['format']!r}, this program writes {FORMAT}; {_WAY_OUT}"
                )
            differences = _differences(tree["setup"], setup)
            for label, model in models.items():
                old = tree["models"].get(label, model)
                differences += _differences(
                    {f"{label} weights": old["fingerprint"]}, {f"{label} weights": model["fingerprint"]}
                )
                differences += _differences(old["protocol"], model["protocol"])
            for row in tree["episodes"]:
                _episode(row)
            if not isinstance(tree["deaths"], list) or not isinstance(tree["environments"], dict):
                raise TypeError("deaths and environments are a list and an object")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{self.path} is damaged ({type(error).__name__}: {error}); {_WAY_OUT}") from error
        if not tree["episodes"]:
            return self._tree  # a run that ended before its first episode binds nobody
        if differences:
            raise ConfigError(
                f"{self.path} holds episodes of another evaluation ({'; '.join(differences)}), which are not mixed; {_WAY_OUT}"
            )
        return tree


_WAY_OUT = "choose another --out, or remove the folder"


def _episode(row: Mapping[str, Any]) -> EpisodeResult:
    return EpisodeResult(**{name: value for name, value in row.items() if name != "model"})


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    names = sorted({*old, *new})
    return [f"{name}: {old.get(name)} there, {new.get(name)} now" for name in names if old.get(name) != new.get(name)]


def _plain(tree: Any) -> Any:
    """As it is read back: tuples become lists."""
    return json.loads(json.dumps(tree, allow_nan=False))


def fingerprint_of_export(folder: Path) -> str:
    """A hash over the weights, the model's config and the processor: what decides how it acts; also of a checkpoint."""
    files = [
        path
        for path in folder.iterdir()
        if path.suffix in (".safetensors", ".bin", ".py") or path.name in ("config.json", "stoker_processor.json")
    ]
    for part in ("deepspeed", "processor"):  # of a checkpoint
        files += [path for path in (folder / part).rglob("*") if path.is_file()]
    total = hashlib.blake2b(digest_size=16)
    for path in sorted(files):
        with path.open("rb") as file:
            name, content = path.relative_to(folder).as_posix(), hashlib.file_digest(file, "blake2b").hexdigest()
            total.update(f"{name}\0{content}\0".encode())
    return total.hexdigest()


def versions() -> dict[str, str]:
    """Versions of the packages that decide what an episode looks like, as far as they are installed."""
    found = {}
    for name in _SIMULATOR_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
