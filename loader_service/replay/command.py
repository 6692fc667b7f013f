"""The command `stoker-batch`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from loader_service.inspection.page import Page
from loader_service.inspection.pictures import write_pictures
from loader_service.inspection.show import row_lines, row_tree
from loader_service.pieces.encoder import RecordEncoder
from loader_service.pieces.excluded import exclude_line
from loader_service.plan.token_counts import check_token_counts
from loader_service.prepare.first_records import check_first_records
from loader_service.prepare.run import Prepared, ScanOptions, prepare
from loader_service.replay.compare import Comparison, changes_since
from loader_service.replay.loss_spikes import worst_steps
from loader_service.replay.rebuild import Rebuilder, RebuiltRow
from loader_service.replay.step import SPLIT, RunStep, Stream
from loader_service.server.command import all_fingerprints
from stoker_proto.arguments import not_negative, positive
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
  stoker-batch --run outputs/demo --worst-loss 5             which samples made the loss rise
  stoker-batch --run outputs/demo --worst-loss 5 --exclude-lines >> exclude.txt     for data.exclude
  stoker-batch --run outputs/demo --step 120 --set 'data.train_data_paths=[/mnt/demos/*.jsonl]'

exit codes: 0 the rows are those that were trained; 1 a row differs, or something is missing; 2 the command line is wrong"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return 0. Raises StokerError, which the entry point prints (`loader_service.cli`)."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.exclude_lines and (arguments.worst_loss is None or arguments.json or arguments.html):
        parser.error("--exclude-lines goes with --worst-loss, and without --json and --html")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    return _show_worst(arguments) if arguments.worst_loss is not None else _show_step(arguments)


class _Run:
    """The data of a run, prepared, and what makes its rows again: one for all steps with the same record."""

    def __init__(self, step: RunStep, overrides: Sequence[str]) -> None:
        self.config = step.record.read_config(overrides)
        model = Path(self.config.model.base_model_path)
        self.processor = Processor.from_json(step.record.processor, model / "tokenizer.json")
        prepared = prepare(self.config, splits=(SPLIT,), fit=False, scan=ScanOptions(progress=sys.stderr.isatty()))
        now = all_fingerprints(self.config, prepared, self.processor)
        self.changes = changes_since(step.record.fingerprints, now, self.config.data)
        for change in self.changes:
            logger.warning("since the run, this changed: %s", change)
        self.rebuilder = _rebuilder(self.config, prepared, self.processor, step)


def _show_step(arguments: argparse.Namespace) -> int:
    step = RunStep.read(arguments.run, arguments.step)
    step.check_rank(arguments.rank)
    run = _Run(step, arguments.set)
    show = _Show(arguments, run, f"step {arguments.step} of {arguments.run}")
    comparison = Comparison(step)
    for batch in run.rebuilder.step(step, arguments.rank):
        differing = comparison.add(batch)
        for row in batch.rows:
            show.row(row, differs=row in differing)
    show.close()
    comparison.check(run.changes)
    if not arguments.json:
        ranks = f"rank {arguments.rank}" if arguments.rank is not None else f"{len(step.lines)} ranks"
        print(
            f"step {arguments.step}: {comparison.num_rows} rows of {ranks} are those that were trained; {_loss(step)}"
        )
    return 0


def _show_worst(arguments: argparse.Namespace) -> int:
    runs: dict[str, _Run] = {}
    show: _Show | None = None
    for worst, step, rows in worst_steps(arguments.run, arguments.worst_loss):
        if worst.record not in runs:
            runs[worst.record] = _Run(step, arguments.set)
        run = runs[worst.record]
        show = show or _Show(arguments, run, f"worst losses of {arguments.run}")
        above = "not finite" if worst.excess is None else f"{worst.excess:.4g} above the mean of the steps before"
        if not arguments.json:
            mark = "# " if arguments.exclude_lines else ""
            print(
                f"{mark}step {worst.step}: loss {'not finite' if worst.loss is None else f'{worst.loss:.6g}'}, {above}"
            )
        comparison = Comparison(step)
        batches = {
            place: run.rebuilder.batch(step, *place) for place in sorted({(row.rank, row.micro_batch) for row in rows})
        }
        differing = [row for batch in batches.values() for row in comparison.add(batch)]
        for row in rows:
            found = batches[row.rank, row.micro_batch].rows[row.number]
            loss = "not finite" if row.loss is None else f"{row.loss:.6g}"
            if arguments.exclude_lines:
                _print_exclude_lines(run, found, loss)
            else:
                show.row(found, differs=found in differing, more={"step": worst.step, "loss": loss})
        comparison.check(run.changes)
    if show is not None:
        show.close()
    return 0


def _print_exclude_lines(run: _Run, found: RebuiltRow, loss: str) -> None:
    """The samples of a row, of which a packed one has several, as data.exclude takes them."""
    print(f"# row {found.number} of micro-batch {found.micro_batch} of rank {found.rank}: loss {loss}")
    for sample in found.row.samples:
        place = str(sample.shard), sample.offset, sample.ref.sample
        print(exclude_line(run.config.data, found.row.manifest, *place))


def _rebuilder(config: Config, prepared: Prepared, processor: Processor, step: RunStep) -> Rebuilder:
    manifests = prepared.entries[SPLIT]
    check_token_counts(prepared.entries, config.data)
    tokens = dict.fromkeys(manifests, 0)
    if config.data.weights and config.data.weigh_by == "tokens":
        tokens = check_first_records(config, prepared, processor)[SPLIT]
    stream = Stream(config, manifests, tokens, step.record)
    return Rebuilder(manifests, RecordEncoder(config.data, processor, config.loader), stream)


def _loss(step: RunStep) -> str:
    line = step.lines[0]
    loss = "not finite" if line.loss is None else f"{line.loss:.6g}"
    return f"epoch {line.epoch}, first sample {line.first_sample}, loss {loss}"


class _Show:
    """Shows rows as the command line asks for: as text, as JSON or on a page."""

    def __init__(self, arguments: argparse.Namespace, run: _Run, title: str) -> None:
        self._arguments, self._processor, self._left = arguments, run.processor, arguments.num
        self._page = None if arguments.html is None else Page(run.config, run.processor, title)

    def row(self, found: RebuiltRow, *, differs: bool, more: Mapping[str, object] | None = None) -> None:
        """Show a row, while `--num` allows. more: what else is to be said of it."""
        if self._left is not None:
            if self._left == 0:
                return
            self._left -= 1
        said = dict(more or {})
        place = f"rank {found.rank}, micro-batch {found.micro_batch}, row {found.number}"
        place = ", ".join([*(f"{name} {value}" for name, value in said.items()), place])
        if self._page is not None:
            self._page.add(found.row, heading=f"{place}: ", is_wrong=differs)
        elif self._arguments.json:
            where = {"rank": found.rank, "micro_batch": found.micro_batch, "row": found.number, "trained": not differs}
            tree = row_tree(found.row, self._processor)
            print(json.dumps({**said, **where, **tree, "digest": found.digest.hex()}))
        else:
            self._print(found, f"{place}{'  DIFFERS FROM WHAT WAS TRAINED' if differs else ''}")

    def _print(self, found: RebuiltRow, place: str) -> None:
        arguments, picture = self._arguments, None
        if arguments.images is not None:
            picture = write_pictures(found.row, self._processor, arguments.images)
        print(place)
        for line in row_lines(
            found.row, self._processor, tokens=arguments.tokens, colour=sys.stdout.isatty(), picture=picture
        ):
            print(line)

    def close(self) -> None:
        """Write the page, if there is one."""
        if self._page is not None:
            self._page.write(self._arguments.html)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "stoker-batch", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="trainer.output_dir of the run")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--step", type=not_negative, metavar="N", help="counted from 1, as in the logs")
    which.add_argument(
        "--worst-loss",
        type=positive,
        metavar="K",
        help="the K steps whose loss rose most, and their rows with the largest loss",
    )
    parser.add_argument(
        "--exclude-lines",
        action="store_true",
        help="with --worst-loss: print the samples of these rows as lines of a data.exclude file, and nothing else",
    )
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
