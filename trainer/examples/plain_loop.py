"""A plain torch loop on a Stoker fleet: `python -m trainer.examples.plain_loop --config my.yaml --out DIR --steps 1000`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from stoker_proto.host.files import whole_file
from trainer.examples.options import Options, read_options
from trainer.feed.dataset import StokerDataset


def main(argv: Sequence[str] | None = None) -> None:
    """Train, or resume from the checkpoint in `--out`."""
    options = read_options(argv, "Train a text model in a plain loop.")
    model = AutoModelForCausalLM.from_pretrained(options.config.model.base_model_path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.config.trainer.lr)
    with StokerDataset(options.config, output_dir=options.out) as dataset:
        step = _resume(options, model, optimizer, dataset)
        while step < options.steps:
            step = _epoch(options, model, optimizer, dataset, step)
    model.save_pretrained(options.out / "model")


def _epoch(options: Options, model: Any, optimizer: torch.optim.Optimizer, dataset: StokerDataset, step: int) -> int:
    """Train to the end of the epoch, or to the last step. Returns the number of steps done."""
    passes = dataset.passes
    for number, batch in enumerate(DataLoader(dataset, batch_size=None), start=1):
        (model(**batch).loss / passes).backward()
        if number % passes:
            continue
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % options.save_every == 0 or step == options.steps:
            _save(options, model, optimizer, dataset)
        if step == options.steps:
            break
    return step


def _save(options: Options, model: Any, optimizer: torch.optim.Optimizer, dataset: StokerDataset) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "feed": dataset.state_dict()}
    with whole_file(options.out / "checkpoint.pt") as unfinished:
        torch.save(state, unfinished)


def _resume(options: Options, model: Any, optimizer: torch.optim.Optimizer, dataset: StokerDataset) -> int:
    """Load the checkpoint, if there is one. Returns the number of steps that it had."""
    path = options.out / "checkpoint.pt"
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    dataset.load_state_dict(state["feed"])
    return int(state["feed"]["steps"])


if __name__ == "__main__":
    main()
