"""The command `stoker-batch`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from loader_service.arguments import not_negative
from loader_service.inspection.page import Page
from loader_service.inspection.pictures import write_pictures
from loader_service.inspection.show import row_lines, row_tree
from loader_service.pieces.encoder import RecordEncoder
from loader_service.plan.token_counts import check_token_counts
from loader_service.prepare.first_records import check_first_records
from loader_service.prepare.run import Prepared, prepare
from loader_service.replay.compare import Comparison, changes_since
from loader_service.replay.rebuild import Rebuilder, RebuiltRow
from loader_service.replay.step import SPLIT, RunStep, Stream
from loader_service.server.command import all_fingerprints
from stoker_proto.config import Config
from stoker_proto.processor import Processor

logger = logging.getLogger(__name__)

_DESCRIPTION = """\
Show the rows that a step of a run trained. They are made again from the data and the run's own record, without loaders, and
compared with the digests in the run's log."""

_EPILOG = """\
examples:
  stoker-batch --run outputs/demo --step 120                 all rows of the step, of all ranks
  stoker-batch --run outputs/demo --step 120 --rank 1 --json one line of JSON for each row of rank 1
  stoker-batch --run outputs/demo --step 120 --num 0         only compare
  stoker-batch --run outputs/demo --step 120 --set 'data.train_data_paths=[/mnt/demos/*.jsonl]'

exit codes: 0 the rows are those that were trained; 1 a row differs, or something is missing; 2 the command line is wrong"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return 0. Raises StokerError, which the entry point prints (`loader_service.cli`)."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    step = RunStep.read(arguments.run, arguments.step)
    step.check_rank(arguments.rank)
    config = step.record.read_config(arguments.set)
    processor = Processor.from_json(step.record.processor, Path(config.model.base_model_path) / "tokenizer.json")
    prepared = prepare(config, splits=(SPLIT,), fit=False, progress=sys.stderr.isatty())
    changes = changes_since(step.record.fingerprints, all_fingerprints(config, prepared, processor), config.data)
    for change in changes:
        logger.warning("since the run, this changed: %s", change)
    rebuilder = _rebuilder(config, prepared, processor, step)
    comparison, left = Comparison(step), arguments.num
    page = None if arguments.html is None else Page(config, processor, f"step {arguments.step} of {arguments.run}")
    for batch in rebuilder.step(step, arguments.rank):
        differing = comparison.add(batch)
        for row in batch.rows:
            if left is None or left > 0:
                if page is None:
                    _print(row, processor, arguments, differs=row in differing)
                else:
                    place = f"rank {row.rank}, micro-batch {row.micro_batch}, row {row.number}: "
                    page.add(row.row, heading=place, is_wrong=row in differing)
                left = None if left is None else left - 1
    if page is not None:
        page.write(arguments.html)
    comparison.check(changes)
    if not arguments.json:
        ranks = f"rank {arguments.rank}" if arguments.rank is not None else f"{len(step.lines)} ranks"
        print(
            f"step {arguments.step}: {comparison.num_rows} rows of {ranks} are those that were trained; {_loss(step)}"
        )
    return 0


def _rebuilder(config: Config, prepared: Prepared, processor: Processor, step: RunStep) -> Rebuilder:
    manifests = prepared.entries[SPLIT]
    check_token_counts(prepared.entries, config.data)
    tokens = dict.fromkeys(manifests, 0)
    if config.data.weights and config.data.weigh_by == "tokens":
        tokens = check_first_records(config, prepared, processor)[SPLIT]
    stream = Stream(config, manifests, tokens, step.record)
    return Rebuilder(manifests, RecordEncoder(config.data, processor), stream)


def _loss(step: RunStep) -> str:
    line = step.lines[0]
    loss = "not finite" if line.loss is None else f"{line.loss:.6g}"
    return f"epoch {line.epoch}, first sample {line.first_sample}, loss {loss}"


def _print(found: RebuiltRow, processor: Processor, arguments: argparse.Namespace, *, differs: bool) -> None:
    row = found.row
    picture = write_pictures(row, processor, arguments.images) if arguments.images is not None else None
    if arguments.json:
        place = {"rank": found.rank, "micro_batch": found.micro_batch, "row": found.number, "trained": not differs}
        print(json.dumps({**place, **row_tree(row, processor), "digest": found.digest.hex()}))
        return
    verdict = "  DIFFERS FROM WHAT WAS TRAINED" if differs else ""
    print(f"rank {found.rank}, micro-batch {found.micro_batch}, row {found.number}{verdict}")
    for line in row_lines(row, processor, tokens=arguments.tokens, colour=sys.stdout.isatty(), picture=picture):
        print(line)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "stoker-batch", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="trainer.output_dir of the run")
    parser.add_argument("--step", type=not_negative, required=True, metavar="N", help="counted from 1, as in the logs")
    parser.add_argument("--rank", type=not_negative, metavar="R", help="only what this rank trained")
    parser.add_argument("--num", type=not_negative, metavar="N", help="rows to show; all are compared (default: all)")
    parser.add_argument("--tokens", action="store_true", help="one line for each token: number, id, text, label or not")
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="write each row's images there, as the model sees them"
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON for each row")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the rows to one page, as loader-inspect does")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=V",
        help="override one key of the run's config, where data or model moved; repeatable",
    )  # fmt: skip
    return parser
