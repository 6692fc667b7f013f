"""Which of an action's tokens a policy gets wrong, and what each costs: on the held-out demonstrations of a `make success` run.

    python tests/benchmarks/action_tokens.py outputs/success --round 1

Of each action all tokens are predicted by one forward. Then true tokens take the places of the first ones, one more in each row
of the table; the last row has the first token as predicted, and the true rest. Errors are means of |decoded - true| over the
timesteps, in an action's unit.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "proto")]

import numpy as np  # noqa: E402 - found through the line above
import torch  # noqa: E402

from loader_service.manifest import EntryManifest  # noqa: E402
from loader_service.pieces.encoder import RecordEncoder  # noqa: E402
from loader_service.pieces.piece import assemble_piece  # noqa: E402
from loader_service.plan.lane_plan import Rows  # noqa: E402
from loader_service.prepare.run import prepare  # noqa: E402
from stoker_proto.config.reader import load_config  # noqa: E402
from stoker_proto.wire.messages import Ticket  # noqa: E402
from trainer.evals.scores import best_actions  # noqa: E402
from trainer.feed.batch import BatchBuilder  # noqa: E402
from trainer.policy_loading import load_parts  # noqa: E402
from trainer.training.inputs import InputMaker  # noqa: E402

ROWS = 32
SLOW = 0.1


def main() -> None:
    """Predict and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="of deploy/success.py")
    parser.add_argument("--round", type=int, default=1, help="whose export is measured; default: %(default)s")
    arguments = parser.parse_args()
    os.chdir(ROOT)  # paths in the config are relative
    config = load_config(arguments.work / f"round-{arguments.round}.yaml", [])
    model, processor, family = load_parts(arguments.work / f"round-{arguments.round}" / "export", torch.float32)
    make_inputs = InputMaker(processor, family, torch.device("cpu"), torch.float32)
    encoder = RecordEncoder(config.data, processor)
    names, sources = config.data.source_names(), config.data.entry_sources("val")
    for entry, manifest in prepare(config, splits=("val",), fit=False).entries["val"].items():
        found = [one for batch in batches(encoder, manifest) for one in predicted(model.eval(), make_inputs, batch)]
        show(names[sources[entry]], found, processor)


def batches(encoder: RecordEncoder, manifest: EntryManifest) -> Iterator[Any]:
    """Micro-batches of the entry's records."""
    for number in range(manifest.num_records):
        record = encoder.encode(manifest, number, 0)
        for start in range(0, len(record.samples), ROWS):
            rows = Rows([(number, sample) for sample in range(start, min(start + ROWS, len(record.samples)))], None)
            count = len(rows.samples)
            ticket = Ticket(ticket=0, split="val", epoch=0, lane=0, start=0, count=count)
            piece = assemble_piece(ticket, "", manifest.entry, rows, {number: record}, record.samples[0])
            build = BatchBuilder(decoder=encoder.processor, num_rows=count, max_tokens=encoder.data.max_seq_len)
            yield build([piece])


def predicted(model: Any, make_inputs: InputMaker, batch: Any) -> Iterator[tuple[Any, Any, Any]]:
    """(true tokens int64[T], predicted ones, action float32[D]) of each row."""
    vocabulary = make_inputs.processor.vocabulary
    assert vocabulary is not None
    first, end = vocabulary.first_id, vocabulary.end_id
    with torch.no_grad():
        logits = model(**make_inputs(batch).arguments, use_cache=False).logits
    chosen = best_actions(logits, first, end).numpy()  # [B, positions]
    for labels, row, action in zip(np.asarray(batch.labels), chosen, np.asarray(batch.actions), strict=True):
        places = np.flatnonzero((labels >= first) & (labels < end))
        yield labels[places].astype(np.int64), row[places - 1], action[0]


def show(name: str, found: list[tuple[Any, Any, Any]], processor: Any) -> None:
    """The table of a task."""
    true, chosen, actions = (np.stack(column) for column in zip(*found, strict=True))
    slow = np.abs(actions[:, :3]).max(axis=1) < SLOW
    right = ", ".join(f"{share:.2f}" for share in (true == chosen).mean(axis=0))
    print(
        f"{name}: {len(found)} actions, {slow.sum()} of them slow (xyz below {SLOW}); right tokens, by place: {right}"
    )
    variants = {"all as predicted": chosen}
    for places in range(1, true.shape[1]):
        variants[f"first {places} true"] = np.concatenate([true[:, :places], chosen[:, places:]], axis=1)
    variants["all true: the codec alone"] = true
    variants["first as predicted"] = np.concatenate([chosen[:, :1], true[:, 1:]], axis=1)
    for label, tokens in variants.items():
        errors = np.abs(np.stack([processor.actions_from_ids(row)[0] for row in tokens]) - actions)
        of_slow = errors[slow][:, :3].mean() if slow.any() else np.nan
        print(f"  {label:26} error {errors.mean():.4f}, of xyz {errors[:, :3].mean():.4f}, of slow steps {of_slow:.4f}")


if __name__ == "__main__":
    main()
