"""TRL's SFTTrainer on a Stoker fleet (extra `trl`): `python -m trainer.examples.trl_sft --config my.yaml --out D --steps 100`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from trainer.examples.options import read_options
from trainer.feed.dataset import StokerDataset
from trainer.feed.hugging_face import SaveFeedState, StokerBatches, load_feed_state, newest_checkpoint


class StokerSFTTrainer(StokerBatches, SFTTrainer):  # type: ignore[misc]
    """An SFTTrainer that reads its batches as they come: tokens and labels, made by the loaders."""

    def __init__(self, *arguments: Any, train_dataset: StokerDataset, **more: Any) -> None:
        # TRL accepts only tables of `datasets`, and looks at the columns of the first row; no batch comes from this one.
        columns = Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]}).to_iterable_dataset()
        super().__init__(*arguments, train_dataset=columns, **more)
        self.train_dataset = train_dataset


def main(argv: Sequence[str] | None = None) -> None:
    """Train, or resume from the newest checkpoint in `--out`."""
    options = read_options(argv, "Train a text model with TRL's SFTTrainer.")
    trainer, model_path = options.config.trainer, options.config.model.base_model_path
    with StokerDataset(options.config, output_dir=options.out) as dataset:
        arguments = SFTConfig(
            output_dir=str(options.out),
            max_steps=options.steps,
            per_device_train_batch_size=trainer.micro_batch_size,
            gradient_accumulation_steps=dataset.passes,
            ignore_data_skip=True,
            learning_rate=trainer.lr,
            save_steps=options.save_every,
            save_total_limit=2,
            report_to="none",
            bf16=torch.cuda.is_available(),  # its default is True, which a CPU refuses
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        checkpoint = newest_checkpoint(options.out)
        if checkpoint is not None:
            load_feed_state(checkpoint, dataset)
        run = StokerSFTTrainer(
            AutoModelForCausalLM.from_pretrained(model_path),
            arguments,
            train_dataset=dataset,
            processing_class=PreTrainedTokenizerFast.from_pretrained(model_path),
            callbacks=[SaveFeedState(dataset)],
        )
        run.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        run.save_model(str(options.out / "model"))


if __name__ == "__main__":
    main()
