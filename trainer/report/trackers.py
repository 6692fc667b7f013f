"""Where figures go: TensorBoard, Weights & Biases, or nowhere (on all ranks but the first)."""

from __future__ import annotations

import importlib
import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml
from PIL import Image

from stoker_proto.config import Config
from stoker_proto.config.reader import config_to_tree
from stoker_proto.errors import ConfigError
from trainer.report.charts import CHARTS, RESULTS, hyper_parameters


class Tracker(Protocol):
    """A place for scalars."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Figures of step `step` (counted from 1), by name: `train/loss`, `val/perplexity` ...

        Steps may go back: an evaluation that took long is of an earlier step.
        """

    def show(self, name: str, path: Path, step: int) -> None:
        """A picture (.png) or a video (.mp4) of step `step`."""

    def close(self) -> None:
        """Write what is still held back."""


class TensorBoardTracker:
    """Event files in a folder."""

    def __init__(self, folder: Path, first_step: int, config: Config) -> None:
        """first_step: figures of a lost run from there on are hidden; all of them where it had not saved yet."""
        from torch.utils.tensorboard.summary import hparams
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step)
        self._writer.add_custom_scalars(CHARTS)
        self._writer.add_text(
            "config", f"```yaml\n{yaml.safe_dump(config_to_tree(config), sort_keys=False)}```", first_step
        )
        # Not `add_hparams`: it writes a run of its own, whose figures are not those of this one.
        summaries: Any = hparams(hyper_parameters(config), dict.fromkeys(RESULTS, 0.0))  # type: ignore[no-untyped-call]
        for summary in summaries:
            self._writer._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """One scalar each."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def show(self, name: str, path: Path, step: int) -> None:
        """Pictures only: videos would need one more package, and their files lie beside the figures."""
        if path.suffix == ".png":
            with Image.open(path) as picture:
                self._writer.add_image(name, np.array(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Write what is still held back."""
        self._writer.close()


RUN_ID_FILE = "wandb-run-id"
"""In `output_dir`: a resumed run continues the same run of Weights & Biases."""


def import_wandb() -> Any:
    """The package. Raises ConfigError where it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            "trainer.logger.wandb is true, but the package wandb is not installed: pip install 'stoker[wandb]', "
            "or --set trainer.logger.wandb=false"
        ) from error


class WandbTracker:
    """A run at Weights & Biases; `WANDB_MODE=offline` keeps it in the folder."""

    def __init__(self, config: Config, folder: Path, *, is_resumed: bool) -> None:
        """is_resumed: go on with the run whose id is in `output_dir`. Raises ConfigError where the run cannot begin."""
        wandb, logger = import_wandb(), config.trainer.logger
        file = Path(config.trainer.output_dir) / RUN_ID_FILE
        run_id = file.read_text(encoding="utf-8").strip() if is_resumed and file.is_file() else secrets.token_hex(4)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{run_id}\n", encoding="utf-8")
        try:
            self._run: Any = wandb.init(
                project=logger.wandb_project, name=logger.wandb_name, tags=list(logger.wandb_tags), id=run_id, resume="allow",
                dir=str(folder), config=config_to_tree(config),
            )  # fmt: skip
        except wandb.Error as error:  # nobody is logged in, say
            raise ConfigError(
                f"trainer.logger.wandb is true, and it cannot begin: {' '.join(str(error).split())}; call `wandb login` once "
                "on the first rank's host, set WANDB_MODE=offline, or --set trainer.logger.wandb=false"
            ) from error
        self._media: Any = {".mp4": wandb.Video, ".png": wandb.Image}
        # It drops rows of a step before its newest. So figures of evaluations have a step of their own as their axis.
        self._run.define_metric("val/step")
        self._run.define_metric("val/*", step_metric="val/step")
        self._newest = 0

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """One row."""
        self._add(dict(figures), step)

    def show(self, name: str, path: Path, step: int) -> None:
        """The file is copied into the run."""
        if path.suffix in self._media:
            self._add({name: self._media[path.suffix](str(path))}, step)

    def _add(self, row: dict[str, Any], step: int) -> None:
        self._newest = max(self._newest, step)
        if any(name.startswith("val/") for name in row):
            row["val/step"] = step
        self._run.log(row, step=self._newest)

    def close(self) -> None:
        """Send or write what is still held back."""
        self._run.finish()


class Trackers:
    """All that the config asks for, on the first rank; none on the others. Raises ConfigError for a folder that is not to be
    written."""

    def __init__(self, config: Config, *, is_first: bool, first_step: int) -> None:
        logger = config.trainer.logger
        folder = Path(logger.log_dir or config.trainer.output_dir)
        self._trackers: list[Tracker] = []
        if not is_first:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if logger.wandb:
                self._trackers.append(WandbTracker(config, folder, is_resumed=first_step > 1))
            if logger.tensorboard:
                self._trackers.append(TensorBoardTracker(folder / "tensorboard", first_step, config))
        except OSError as error:
            key = "trainer.output_dir" if logger.log_dir is None else "trainer.logger.log_dir"
            raise ConfigError(
                f"{key} is {str(folder)!r}: {error.filename or folder} cannot be written ({error.strerror or error}); name "
                "another folder"
            ) from error

    @property
    def is_active(self) -> bool:
        """Whether anything is written."""
        return bool(self._trackers)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """To all; what is not a number is left out."""
        numbers = {name: value for name, value in figures.items() if not math.isnan(value)}
        for tracker in self._trackers:
            tracker.log(numbers, step)

    def show(self, media: Mapping[str, Path], step: int) -> None:
        """Pictures and videos by name, to all; a file that is not there is left out."""
        for name, path in media.items():
            if path.is_file():
                for tracker in self._trackers:
                    tracker.show(name, path, step)

    def close(self) -> None:
        """All of them."""
        for tracker in self._trackers:
            tracker.close()
