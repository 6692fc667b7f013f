"""The command `loader-inspect`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from loader_service.inspection.page import Page
from loader_service.inspection.pictures import write_pictures
from loader_service.inspection.rows import InspectedRow, first_rows, rows_of_record
from loader_service.inspection.show import row_lines, row_tree
from loader_service.manifest import EntryManifest
from loader_service.pieces.encoder import RecordEncoder
from loader_service.prepare.cameras import camera_findings
from loader_service.prepare.run import ScanOptions, prepare
from loader_service.sources.base import make_datasets
from stoker_proto.arguments import not_negative
from stoker_proto.config import DataConfig
from stoker_proto.config.reader import add_config_arguments, load_config
from stoker_proto.errors import ConfigError, DataError
from stoker_proto.host.trouble import host_errors
from stoker_proto.processor import Processor

logger = logging.getLogger(__name__)

_DESCRIPTION = """\
Show rows as a trainer would receive them: where they come from, their text with the labels marked, their images, their
action, and the action that its tokens decode to. It runs the loader's own code without a server. Use it while you write a
dataset class, a template or a config."""

_EPILOG = """\
examples:
  loader-inspect --config my.yaml                          the first three rows of each entry
  loader-inspect --config my.yaml --source chat --tokens   one line for each token
  loader-inspect --config my.yaml --record 17 --num 100    all samples of one record
  loader-inspect --config my.yaml --images pictures        what the model sees, as PNG files
  loader-inspect --config my.yaml --num 20 --html rows.html  one page for a browser: rows, pictures, charts

exit codes: 0 all is well; 1 the config or the data is wrong; 2 the command line is wrong"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return 0. Raises StokerError, which the entry point prints (`loader_service.cli`)."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    config = load_config(arguments.config, arguments.set)
    prepared = prepare(config, scan=ScanOptions(progress=sys.stderr.isatty()))
    processor = Processor.build(config, prepared.codec, prepared.states)
    encoder = RecordEncoder(config.data, processor, config.loader)
    entries = wanted_entries(config.data, arguments.split, arguments.source, arguments.entry)
    if arguments.record is not None and len(entries) > 1:
        raise ConfigError(
            f"--record {arguments.record}: of which entry? Add --entry, one of {', '.join(map(str, entries))}"
        )
    title = f"loader-inspect --config {arguments.config}, {arguments.split}, epoch {arguments.epoch}"
    page = Page(config, processor, title) if arguments.html is not None else None
    for entry in entries:
        manifest = prepared.entries[arguments.split][entry]
        rows: Iterator[InspectedRow]
        if arguments.record is None:
            rows = first_rows(manifest, encoder, config.data, epoch=arguments.epoch, count=arguments.num)
        else:
            rows = rows_of_record(manifest, encoder, arguments.record, epoch=arguments.epoch, count=arguments.num)
        for finding in _camera_findings(config.data, manifest, processor):
            logger.warning("%s: %s", manifest.path, finding)
        for row in rows:
            if page is not None:
                page.add(row)
            else:
                _print(row, processor, arguments)
    if page is not None:
        page.write(arguments.html)
        print(arguments.html)
    return 0


def _camera_findings(data: DataConfig, manifest: EntryManifest, processor: Processor) -> list[str]:
    """What the model does not see of the entry's first sample. None where it is bad: its row says so."""
    dataset = make_datasets(data)[data.entry_sources(manifest.split)[manifest.entry]]
    for record in np.flatnonzero(manifest.num_samples[:1000])[:1].tolist():
        shard, offset, size = manifest.place(record)
        try:
            with host_errors(str(shard)), dataset.reading():
                for sample in islice(dataset.read(dataset.local(shard), offset, size), 1):
                    return camera_findings(sample.images, processor.image)
        except DataError as error:
            logger.info("a bad first sample of %s: %s", manifest.path, error)
    return []


def wanted_entries(data: DataConfig, split: str, source: str | None, entry: int | None) -> list[int]:
    """Numbers of the entries that the command line selects. Raises ConfigError."""
    entries = list(range(len(data.paths(split))))
    if not entries:
        raise ConfigError(f"--split {split}: the config names no data of it")
    if source is not None:
        names = data.source_names()
        if source not in names:
            raise ConfigError(f"--source {source}: the config has {', '.join(names)}")
        entries = [number for number, of in enumerate(data.entry_sources(split)) if names[of] == source]
    if entry is not None:
        if entry not in entries:
            raise ConfigError(f"--entry {entry}: one of {', '.join(map(str, entries)) or 'none'} is expected")
        entries = [entry]
    return entries


def _print(row: InspectedRow, processor: Processor, arguments: argparse.Namespace) -> None:
    picture = write_pictures(row, processor, arguments.images) if arguments.images is not None else None
    if arguments.json:
        print(json.dumps({**row_tree(row, processor), "picture": None if picture is None else str(picture)}))
        return
    for line in row_lines(row, processor, tokens=arguments.tokens, colour=sys.stdout.isatty(), picture=picture):
        print(line)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "loader-inspect", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument("--split", choices=("train", "val"), default="train", help="which data paths (default: train)")
    parser.add_argument("--source", metavar="NAME", help="only entries of this one of data.sources")
    parser.add_argument("--entry", type=int, metavar="N", help="only this entry of the data paths")
    parser.add_argument(
        "--record", type=int, metavar="N", help="this record instead of the first rows in training order"
    )
    parser.add_argument("--num", type=not_negative, default=3, metavar="N", help="rows of each entry (default: 3)")
    parser.add_argument(
        "--epoch",
        type=not_negative,
        default=0,
        metavar="N",
        help="epoch whose order and augmentation are shown (default: 0)",
    )
    parser.add_argument("--tokens", action="store_true", help="one line for each token: number, id, text, label or not")
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="write each row's images there, as the model sees them"
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON for each row")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write one page that holds all rows, pictures and charts"
    )
    return parser
