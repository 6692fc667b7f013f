"""The command `loader-top`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import deque
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from loader_service.top.fleet import Fleet, FleetView
from loader_service.top.scrape import Scrape, scrape_all
from loader_service.top.view import import_rich, render
from stoker_proto.errors import ConfigError
from stoker_proto.fleet.metrics import import_client
from stoker_proto.fleet.pages import parse_host_port
from stoker_proto.host.files import write_whole

_WINDOW_S = 30.0
"""Figures are of the last so many seconds: long enough for records of seconds."""

_EPILOG = """\
The addresses are those of loader-serve --metrics and of the trainer's trainer.logger.metrics, in any order.

examples:
  loader-top loader-a:9100 loader-b:9100 trainer:9101
  loader-top --file fleet.txt                                one HOST:PORT a line; read again each time
  loader-top --file fleet.txt --once --json --interval 10    what happened within 10 seconds

exit codes: 0 all is well; 1 with --once: no address answers; 2 the command line is wrong"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run until Ctrl-C, or once. Returns the exit code. Raises ConfigError."""
    arguments = _parse(argv)
    import_client()
    rich = None if arguments.json else import_rich()
    fleet = Fleet()
    before = scrape_all(addresses_of(arguments))
    if arguments.once:
        time.sleep(arguments.interval)
        view = fleet.view(before, scrape_all(addresses_of(arguments)), datetime.now())
        if rich is None:
            print(json.dumps(view.to_json()))
        else:
            console = rich.console.Console(record=arguments.svg is not None)
            console.print(render(view, rich))
            if arguments.svg is not None:
                _write_picture(arguments.svg, console.export_svg(title="loader-top"))
        return 0 if view.loaders or view.trainers else 1
    moments: deque[list[Scrape]] = deque([before], maxlen=1 + max(1, round(_WINDOW_S / arguments.interval)))
    assert rich is not None  # --json without --once is rejected
    with rich.live.Live(render(_view(fleet, moments), rich), auto_refresh=False, screen=sys.stdout.isatty()) as live:
        while True:
            time.sleep(arguments.interval)
            moments.append(scrape_all(addresses_of(arguments)))
            live.update(render(_view(fleet, moments), rich), refresh=True)


def _write_picture(file: Path, picture: str) -> None:
    try:
        write_whole(file, picture.encode())
    except OSError as error:
        raise ConfigError(f"--svg {file} cannot be written ({error}): name a file in a folder that is there") from error


def _view(fleet: Fleet, moments: deque[list[Scrape]]) -> FleetView:
    """From the oldest moment to the newest. A program that joined or restarted since then is compared with its own first one."""
    first: dict[str, Scrape] = {}
    for moment in moments:
        for one in moment:
            known = first.get(one.address)
            uptime = "stoker_loader_uptime_seconds"
            if known is None or known.error or one.value(uptime) < known.value(uptime):
                first[one.address] = one
    return fleet.view(list(first.values()), moments[-1], datetime.now())


def addresses_of(arguments: argparse.Namespace) -> list[str]:
    """Of the command line and of the file, each once. Raises ConfigError."""
    found = list(arguments.addresses)
    if arguments.file is not None:
        try:
            lines = arguments.file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--file {arguments.file} cannot be read ({error}): name a file with one HOST:PORT a line"
            ) from error
        found += [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    for address in found:
        parse_host_port(address, "--file" if arguments.file is not None else "loader-top")
    if not found:
        raise ConfigError("no address: name HOST:PORT of loader-serve --metrics, or a --file that lists them")
    return list(dict.fromkeys(found))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "loader-top",
        description="Show a fleet live: what each loader gives, in which stage its threads work, how long the trainer waits, and "
        "what limits the training.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("addresses", nargs="*", metavar="HOST:PORT", help="address of a /metrics page")
    parser.add_argument("--file", type=Path, metavar="FILE", help="more addresses, one a line")
    parser.add_argument(
        "--interval", type=_seconds, default=2.0, metavar="S", help="seconds between two readings; default: %(default)s"
    )
    parser.add_argument("--once", action="store_true", help="read twice, show what happened in between, and exit")
    parser.add_argument("--json", action="store_true", help="with --once: one line of JSON")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="with --once: also write the table as a picture")
    arguments = parser.parse_args(argv)
    for name in ("json", "svg"):
        if getattr(arguments, name) and not arguments.once:
            parser.error(f"--{name} goes with --once")
    if arguments.json and arguments.svg:
        parser.error("--svg shows what --json does not: give one of them")
    return arguments


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: a number of seconds is expected") from None
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text}: 0.1 to 3600 seconds")
    return seconds
