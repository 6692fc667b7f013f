"""The command `loader-prepare`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loader_service.pieces.text_samples import Counting
from loader_service.plan.token_counts import check_token_counts
from loader_service.prepare.first_records import check_first_records
from loader_service.prepare.run import Prepared, ScanOptions, prepare
from loader_service.prepare.summary import action_findings, report_of, summary_lines, summary_tree
from loader_service.prepare.verify import verify
from loader_service.sources.base import make_datasets
from stoker_proto.actions import save_codec
from stoker_proto.arguments import not_negative
from stoker_proto.config import Config
from stoker_proto.config.reader import add_config_arguments, load_config
from stoker_proto.errors import ConfigError, DataError
from stoker_proto.host.hub_cache import find_model_folder
from stoker_proto.processor import Processor

logger = logging.getLogger(__name__)

_DESCRIPTION = """\
Scan the data once, before training: count records and samples, compute statistics of the actions, and fit the codec that
turns actions into tokens. The results are kept in a `.stoker` folder beside the data, so that loaders start at once. After a
change of the data only the changed parts are scanned again. `loader-serve` does the same itself if results are missing.
Only the images of the first samples are opened, unless --verify reads all of them."""

_EPILOG = """\
examples:
  loader-prepare --config demo.yaml
  loader-prepare --config demo.yaml --set data.action.codec=bins --json
  loader-prepare --config demo.yaml --cache-dir /var/cache/stoker      the data cannot be written to
  loader-prepare --config demo.yaml --codec-out actions.json           loaders hold different data: give all of them this
                                                                       file as data.action.codec_path
  loader-prepare --config demo.yaml --verify                           read every frame once (takes as long as an epoch)

exit codes: 0 all is well; 1 the config or the data is wrong; 2 the command line is wrong; 130 interrupted: run it again,
and it resumes"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return 0. Raises StokerError, which the entry point prints (`loader_service.cli`)."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    config = load_config(arguments.config, arguments.set)
    if arguments.cache_dir is not None:
        config = replace(config, data=replace(config.data, cache_dir=str(arguments.cache_dir)))
    progress = sys.stderr.isatty() and not arguments.json
    scan = ScanOptions(processes=arguments.processes, progress=progress, rescan=arguments.rescan)
    prepared = prepare(config, scan=scan)
    check_token_counts(prepared.entries, config.data)
    if not find_model_folder(
        config.model.base_model_path
    ).is_dir():  # a host that only prepares data need not have the model
        logger.warning(
            "model.base_model_path is %r, and there is no such folder: no row was made, so nothing is known of whether rows fit "
            "into data.max_seq_len",
            config.model.base_model_path,
        )
    else:
        check_first_records(config, prepared, Processor.build(config, prepared.codec, prepared.states))
    if arguments.codec_out is not None:
        _write_codec(prepared, arguments.codec_out)
    if arguments.state_out is not None:
        _write_states(prepared, arguments.state_out)
    report = report_of(prepared, config.data.action)
    findings = action_findings(prepared, config.data.action)
    problems = _verify(prepared, config, arguments.processes, progress) if arguments.verify else []
    if arguments.json:
        tree = summary_tree(prepared, report, findings)
        print(json.dumps({**tree, "problems": problems} if arguments.verify else tree))
    else:
        print("\n".join(summary_lines(prepared, report, findings)))
        if arguments.verify:
            print(
                f"verified: every record was read, {len(problems)} bad"
                if problems
                else "verified: every record was read"
            )
    for problem in problems:
        print(f"loader-prepare: {problem}", file=sys.stderr)
    _check_problems(problems, prepared, config)
    return 0


def _check_problems(problems: Sequence[str], prepared: Prepared, config: Config) -> None:
    """Raises DataError, under policy `skip` for more bad records than the scan found: those that a run need not notice."""
    if problems and config.data.on_bad_sample == "fail":
        raise DataError(
            f"{len(problems)} bad records, named above: mend or remove them, or set data.on_bad_sample to skip"
        )
    known = sum(manifest.num_bad for entries in prepared.entries.values() for manifest in entries.values())
    if len(problems) > known:
        raise DataError(
            f"{len(problems)} bad records, named above, of which the scan saw {known}: mend or remove the others, since a run "
            "skips only those whose fault it can see"
        )


def _write_codec(prepared: Prepared, path: Path) -> None:
    if prepared.codec is None:
        raise ConfigError("--codec-out: the data has no actions, so there is no codec to write")
    try:
        save_codec(prepared.codec, path)
    except OSError as error:
        raise ConfigError(f"--codec-out {path} cannot be written ({error.strerror}): name another file") from error


def _write_states(prepared: Prepared, path: Path) -> None:
    if prepared.states is None:
        raise ConfigError("--state-out: data.state is not text, so there is no scale of states to write")
    try:
        path.write_text(json.dumps(prepared.states.to_json()), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--state-out {path} cannot be written ({error.strerror}): name another file") from error


def _verify(prepared: Prepared, config: Config, processes: int, progress: bool) -> list[str]:
    problems: list[str] = []
    for number, dataset in enumerate(make_datasets(config.data)):
        manifests = [
            manifest
            for split, entries in prepared.entries.items()
            for entry, manifest in entries.items()
            if config.data.entry_sources(split)[entry] == number
        ]
        counting = Counting.needed(config, dataset)
        problems += verify(manifests, dataset, processes=processes, progress=progress, counting=counting)
    return problems


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "loader-prepare", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="FOLDER",
        help="keep the results here (data.cache_dir; default: beside the data)",
    )
    parser.add_argument(
        "--processes",
        type=not_negative,
        default=0,
        metavar="N",
        help="processes that scan the data (default: one per core)",
    )
    parser.add_argument("--codec-out", type=Path, metavar="FILE", help="write the fitted action codec here too")
    parser.add_argument(
        "--state-out", type=Path, metavar="FILE", help="write the scale of the states here too (data.state_path)"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="then read every record, with all its frames and checksums, and list the bad ones",
    )
    parser.add_argument(
        "--rescan",
        action="store_true",
        help="scan everything again. Changed shards are always noticed. Changed NPZ files and videos beside an unchanged shard "
        "are noticed here only with this option, and by loaders when they open them",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON and no progress bar")
    return parser
