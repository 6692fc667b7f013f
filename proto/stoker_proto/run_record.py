"""What a run keeps in `output_dir` so that the rows of any of its steps can be made again and compared.

    digests-rank0.jsonl         a line for each step of the rank; a resumed run appends
        {"step": 7, "epoch": 0, "first_sample": 96, "micro_batches": ["9f0c...", "52aa..."], "rows": ["1a2b3c4d5e6f", ...],
         "record": "0a1b2c3d4e5f", "loss": 3.1415926}
    record/0a1b2c3d4e5f.json    what such lines were made with: `RunRecord`
    worst-rank0.json            the losses of this rank's rows in the steps whose loss rose most: `WorstStep`

`micro_batches` are SHA-256 over the digests of a micro-batch's rows (`stoker_proto.wire.digests`); `rows` has the first
ROW_BYTES bytes of each row's digest, so that a difference has a name. A record's name is a hash of its content: a run that is
resumed with the same settings adds no file, so there are as many files as different settings.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from stoker_proto.config import Config
from stoker_proto.config.reader import apply_override, config_from_tree, config_to_tree
from stoker_proto.errors import ConfigError, DataError
from stoker_proto.hashing import fingerprint
from stoker_proto.host.files import write_whole
from stoker_proto.wire.digests import RULE, RULES

FORMAT = 1
FOLDER = "record"
ROW_BYTES = 3
"""Bytes of a row's digest in the log: enough to find the row, as the micro-batch's digest proves that one differs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """All that decides the rows of a step beside the data, for one start of a run."""

    config: dict[str, Any]
    """The keys of `model`, `data` and `trainer` that decide rows."""
    world_size: int
    fingerprints: dict[str, str]
    """As the loaders had them: of data, tokenizer, codec, images."""
    pass_samples: tuple[int, ...]
    """Rows of one pass over each source."""
    processor: str
    """`Processor.to_json()`: with the codec that was fitted then."""
    digest_rule: int = 1
    """`stoker_proto.wire.digests.RULE` of the digests in the logs; records of earlier versions do not name it."""

    @classmethod
    def of(
        cls,
        config: Config,
        world_size: int,
        fingerprints: dict[str, str],
        pass_samples: Sequence[int],
        processor: str,
    ) -> Self:
        """The record of a run that starts now."""
        trainer, model = config.trainer, config.model
        sizes = {"micro_batch_size": trainer.micro_batch_size, "global_batch_size": trainer.global_batch_size}
        tree = {
            "model": {"base_model_path": model.base_model_path, "trust_remote_code": model.trust_remote_code},
            "data": config_to_tree(config.data),
            "trainer": {**sizes, "lr": trainer.lr},
        }
        return cls(
            config=tree,
            world_size=world_size,
            fingerprints=dict(fingerprints),
            pass_samples=tuple(pass_samples),
            processor=processor,
            digest_rule=RULE,
        )

    def write(self, output_dir: Path) -> str:
        """Write the record unless it is there. Returns its name."""
        tree = {"format": FORMAT, **asdict(self), "pass_samples": list(self.pass_samples)}
        name = fingerprint(tree)[:12]
        path = output_dir / FOLDER / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(tree).encode())
        return name

    @classmethod
    def read(cls, output_dir: Path, name: str) -> Self:
        """The record of that name. Raises DataError."""
        path = output_dir / FOLDER / f"{name}.json"
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            found = tree.pop("format")
            if found != FORMAT:
                raise DataError(f"format {found}: this program reads {FORMAT}", file=str(path))
            if (rule := tree.get("digest_rule", 1)) not in RULES:
                raise DataError(f"digest_rule {rule}: this program knows 1 to {RULES[-1]}", file=str(path))
            if rule > RULE:
                raise DataError(f"digest_rule {rule} needs the package xxhash: pip install xxhash", file=str(path))
            return cls(**{**tree, "pass_samples": tuple(tree["pass_samples"])})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"not the record of a run ({error!r}): copy the whole output_dir of the run", file=str(path)
            ) from error

    def read_config(self, overrides: Sequence[str] = ()) -> Config:
        """The config of the run, as far as it decides rows. overrides: `a.b=value`, for data or a model that moved."""
        tree = copy.deepcopy(self.config)
        for override in overrides:
            apply_override(tree, override)
        return config_from_tree(tree)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLine:
    """One step of one rank, as its log has it."""

    step: int
    """Counted from 1."""
    epoch: int
    first_sample: int
    """Stream position of the global batch's first row."""
    micro_batches: tuple[str, ...]
    """Hex digest of each micro-batch."""
    rows: tuple[str, ...]
    """For each micro-batch: ROW_BYTES bytes of the digest of each row, as hex, one after another."""
    record: str
    """Name of the `RunRecord`."""
    loss: float | None

    def row_digest(self, micro_batch: int, row: int) -> str:
        """Hex digits of a row's digest; empty where the log has none."""
        size = 2 * ROW_BYTES
        return self.rows[micro_batch][size * row : size * (row + 1)]


def log_file(output_dir: Path, rank: int) -> Path:
    """The digest log of a rank."""
    return output_dir / f"digests-rank{rank}.jsonl"


def read_step(output_dir: Path, rank: int, step: int) -> StepLine:
    """The newest line of a step. Raises ConfigError for a step that is not there, DataError for a damaged log."""
    path, found = log_file(output_dir, rank), None
    last = 0
    for line in read_lines(path):
        last = max(last, int(line.get("step", 0)))
        if line.get("step") == step:
            found = line
    if found is None:
        raise ConfigError(f"step {step}: {path} has steps up to {last}; name one of them")
    if "record" not in found:
        raise DataError(f"step {step} was trained by an older version, which kept no record of the run", file=str(path))
    try:
        values = {field.name: found[field.name] for field in dataclasses.fields(StepLine)}
        return StepLine(**{**values, "micro_batches": tuple(found["micro_batches"]), "rows": tuple(found["rows"])})
    except (KeyError, TypeError) as error:
        raise DataError(f"step {step}: a damaged line ({error!r})", file=str(path)) from error


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log. A line that a killed run left unfinished is no step, and is left out. Raises ConfigError."""
    try:
        with path.open(encoding="utf-8") as file:
            for text in file:
                try:
                    line = json.loads(text)
                except ValueError:
                    continue
                if isinstance(line, dict):
                    yield line
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): name the output_dir of a run") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstStep:
    """A step whose loss was above that of the steps before, and the losses of one rank's rows in it."""

    step: int
    record: str
    loss: float | None
    """Of the global batch; None: not finite."""
    excess: float | None
    """How far it was above the running mean of the steps before; None: not finite, more than any number."""
    rows: tuple[tuple[float | None, ...], ...]
    """For each micro-batch: each row's mean NLL per label, 0 without a label; None: not finite."""

    @property
    def rank_key(self) -> tuple[float, int]:
        """Sorts the worst first, equal ones by step."""
        return (-math.inf if self.excess is None else -self.excess, self.step)


def worst_file(output_dir: Path, rank: int) -> Path:
    """The worst steps of a rank."""
    return output_dir / f"worst-rank{rank}.json"


def write_worst(output_dir: Path, rank: int, steps: Sequence[WorstStep]) -> None:
    """Replace the file of a rank."""
    write_whole(worst_file(output_dir, rank), json.dumps([asdict(step) for step in steps]).encode())


def read_worst(output_dir: Path, rank: int) -> list[WorstStep]:
    """The worst steps of a rank, the worst first; none where there is no file. Raises DataError."""
    path = worst_file(output_dir, rank)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [WorstStep(**{**one, "rows": tuple(map(tuple, one["rows"]))}) for one in found]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"not the worst steps of a run ({error!r}): delete it", file=str(path)) from error
