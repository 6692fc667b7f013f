"""transformers' Trainer on a Stoker fleet: `python -m trainer.examples.hugging_face --config my.yaml --out DIR --steps 1000`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from trainer.examples.options import Options, read_options
from trainer.feed.dataset import StokerDataset
from trainer.feed.hugging_face import SaveFeedState, StokerBatches, load_feed_state, newest_checkpoint


class StokerTrainer(StokerBatches, Trainer):  # type: ignore[misc]
    """A Trainer that reads its batches as they come."""


def main(argv: Sequence[str] | None = None) -> None:
    """Train, or resume from the newest checkpoint in `--out`."""
    options = read_options(argv, "Train a text model with transformers' Trainer.")
    with StokerDataset(options.config, output_dir=options.out) as dataset:
        model = AutoModelForCausalLM.from_pretrained(options.config.model.base_model_path)
        arguments = TrainingArguments(**settings(options, dataset))
        run = StokerTrainer(model, arguments, train_dataset=dataset, callbacks=[SaveFeedState(dataset)])
        train(run, dataset, options)


def settings(options: Options, dataset: StokerDataset) -> dict[str, Any]:
    """Arguments of a Trainer whose batches come from loaders: the sizes are those of the config."""
    trainer = options.config.trainer
    return {
        "output_dir": str(options.out),
        "max_steps": options.steps,
        "per_device_train_batch_size": trainer.micro_batch_size,
        "gradient_accumulation_steps": dataset.passes,
        "ignore_data_skip": True,  # a resume starts the feed at its sample
        "learning_rate": trainer.lr,
        "save_steps": options.save_every,
        "save_total_limit": 2,
        "report_to": "none",
    }


def train(run: Trainer, dataset: StokerDataset, options: Options) -> None:
    """Train from the newest checkpoint, or from the start, and write `model` in `--out`."""
    checkpoint = newest_checkpoint(options.out)
    if checkpoint is not None:
        load_feed_state(checkpoint, dataset)
    run.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    run.save_model(str(options.out / "model"))


if __name__ == "__main__":
    main()
