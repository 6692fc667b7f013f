"""TRL's SFTTrainer on a Stoker fleet (extra `trl`): `python -m trainer.examples.trl_sft --config my.yaml --out D --steps 100`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from trainer.examples.hugging_face import settings, train
from trainer.examples.options import read_options
from trainer.feed.dataset import StokerDataset
from trainer.feed.hugging_face import SaveFeedState, StokerBatches


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
    model_path = options.config.model.base_model_path
    with StokerDataset(options.config, output_dir=options.out) as dataset:
        arguments = SFTConfig(
            **settings(options, dataset),
            bf16=torch.cuda.is_available(),  # its default is True, which a CPU refuses
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        run = StokerSFTTrainer(
            AutoModelForCausalLM.from_pretrained(model_path),
            arguments,
            train_dataset=dataset,
            processing_class=PreTrainedTokenizerFast.from_pretrained(model_path),
            callbacks=[SaveFeedState(dataset)],
        )
        train(run, dataset, options)


if __name__ == "__main__":
    main()
