"""The command `loader-doctor`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from loader_service.doctor.facts import Examined
from loader_service.doctor.finding import exit_code, in_order, of_error, report_json, report_lines
from loader_service.doctor.preparing import examine_config
from loader_service.doctor.reading import read_records
from loader_service.doctor.registry import run_checks
from stoker_proto.arguments import not_negative, positive, positive_seconds, positive_share
from stoker_proto.config.reader import add_config_arguments, load_config
from stoker_proto.errors import ConfigError

_DESCRIPTION = """\
Examine the data that a config names, before anything is trained on it. The doctor scans the data as loader-prepare does (what is
kept from an earlier scan is used again), then reads a sample of each entry: the first record, the middle one, the last one, and
others chosen by --seed, with all their images. It writes them as rows, decodes the action tokens again, and runs its checks. It
starts no server and trains nothing.

Each line of the report is one finding: severity, name of the check, file, value, rule, and the way out.
  error    training would fail, or would learn something else than the data says
  warning  probably a fault of the data
  note     worth knowing"""

_EPILOG = """\
examples:
  loader-doctor --config my.yaml
  loader-doctor --config my.yaml --records 200 --seconds 600    read more
  loader-doctor --config my.yaml --strict --json > report.json  in CI: warnings fail too

A clean report says nothing about records that were not read: `loader-prepare --verify` reads every one.
Demonstrations with seeds can also be replayed in their simulator, as recorded and through the action tokens:
`python -m trainer.sim.replay --config my.yaml`, or `python trainer/main.py --config my.yaml --check`.

exit codes: 0 no error; 1 errors; 2 warnings with --strict, or a wrong command line; 130 interrupted (the report of what was
read until then is printed)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Raises HostError where this host cannot read now; KeyboardInterrupt, after the report of what was read."""
    arguments = _parser().parse_args(argv)
    level = logging.WARNING if arguments.verbose else logging.CRITICAL  # what they say is in the report
    logging.basicConfig(level=level, format="%(levelname)s %(message)s", stream=sys.stderr)
    progress = sys.stderr.isatty() and not arguments.json
    try:
        config = load_config(arguments.config, arguments.set)
    except ConfigError as error:
        finding = of_error(error, "config")
        if not arguments.json:
            print(finding.line())
        else:
            print(report_json([finding], {}, strict=arguments.strict))
        return 1
    examined = examine_config(config, progress=progress)
    examined.round_trip_share = arguments.round_trip_share
    try:
        read_records(
            examined, records=arguments.records, seconds=arguments.seconds, seed=arguments.seed, progress=progress
        )
    except KeyboardInterrupt:
        _report(examined, arguments)
        raise
    return _report(examined, arguments)


def _report(examined: Examined, arguments: argparse.Namespace) -> int:
    findings = in_order([*examined.findings, *run_checks(examined)])
    if arguments.json:
        print(report_json(findings, examined.read(), strict=arguments.strict))
    else:
        print("\n".join(report_lines(findings, examined.read())))
    return exit_code(findings, strict=arguments.strict)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "loader-doctor", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--records", type=positive, default=32, metavar="N", help="records of each entry to read (default: 32)"
    )
    parser.add_argument(
        "--seconds",
        type=positive_seconds,
        default=60.0,
        metavar="S",
        help="stop reading records after this time; the scan is not counted (default: 60)",
    )
    parser.add_argument("--seed", type=not_negative, default=0, metavar="N", help="seed of the sample (default: 0)")
    parser.add_argument(
        "--round-trip-share",
        type=positive_share,
        default=0.05,
        metavar="X",
        help="largest mean error of action tokens without a finding, as a share of the dimension's range; more than five "
        "times this is an error (default: 0.05)",
    )
    parser.add_argument("--strict", action="store_true", help="exit with 2 if there are warnings")
    parser.add_argument("--json", action="store_true", help="print one line of JSON and no progress bar")
    parser.add_argument("--verbose", action="store_true", help="also print the log of the scan")
    return parser
