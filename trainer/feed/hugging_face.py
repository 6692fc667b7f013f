"""What transformers' Trainer, and its subclasses such as TRL's SFTTrainer, need to train on a `StokerDataset`.

    class MyTrainer(StokerBatches, transformers.Trainer): ...

    folder = newest_checkpoint(Path(output_dir))
    if folder is not None:
        load_feed_state(folder, dataset)
    trainer = MyTrainer(model, arguments, train_dataset=dataset, callbacks=[SaveFeedState(dataset)])
    trainer.train(resume_from_checkpoint=None if folder is None else str(folder))

The arguments need `max_steps`, `ignore_data_skip=True` and `gradient_accumulation_steps=dataset.passes`; `check_arguments` checks
them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import TrainerCallback

from stoker_proto.errors import ConfigError
from stoker_proto.host.files import write_whole
from trainer.feed.dataset import Batch, StokerDataset

STATE_FILE = "stoker_feed.json"


class StokerBatches:
    """Put it before Trainer among the bases. Each rank reads its own micro-batches as they are: no sampler divides them again,
    and nothing is fetched beyond the step, so that the saved position is that of the saved model."""

    train_dataset: StokerDataset

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """One item is one micro-batch."""
        return DataLoader(self.train_dataset, batch_size=None)


class SaveFeedState(TrainerCallback):  # type: ignore[misc]
    """Writes the position of the dataset into each checkpoint."""

    def __init__(self, dataset: StokerDataset) -> None:
        self._dataset = dataset

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse arguments with which other rows would be trained."""
        check_arguments(args, self._dataset)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint was written: add the position, which is the same on all ranks."""
        found = self._dataset.state_dict()
        if found["steps"] != state.global_step:
            raise ConfigError(
                f"the dataset stands at step {found['steps']} and the trainer at {state.global_step}: load the dataset's state "
                "with load_feed_state before train(resume_from_checkpoint=...)"
            )
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_whole(folder / STATE_FILE, json.dumps(found).encode())


def check_arguments(args: Any, dataset: StokerDataset) -> None:
    """Raises ConfigError for TrainingArguments with which a step would not be a step of the config."""
    expected = {"gradient_accumulation_steps": dataset.passes, "ignore_data_skip": True}
    for name, value in expected.items():
        if getattr(args, name) != value:
            raise ConfigError(f"TrainingArguments.{name} is {getattr(args, name)}: set it to {value}")


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that has a position; one that was being written when the trainer was killed has none."""
    found = [file.parent for file in output_dir.glob(f"checkpoint-*/{STATE_FILE}")]
    return max(found, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def load_feed_state(checkpoint: Path, dataset: StokerDataset) -> None:
    """Continue where the checkpoint was written. Raises ConfigError."""
    dataset.load_state_dict(json.loads((checkpoint / STATE_FILE).read_text()))
