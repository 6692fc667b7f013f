"""Entry points: `loader-serve`, `loader-prepare`, `loader-inspect`, `loader-doctor`, `loader-top`, `loader-convert`,
`loader-keys`, `stoker-batch`; also `python -m loader_service.cli serve|prepare|inspect|doctor|top|convert|keys|batch ...`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

from stoker_proto.errors import StokerError
from stoker_proto.host.descriptors import raise_descriptor_limit
from stoker_proto.host.interrupts import heed_interrupts
from stoker_proto.host.trouble import host_error


def serve(argv: list[str] | None = None) -> int:
    """`loader-serve`."""
    from loader_service.server import command

    arguments = command.parse_arguments(argv)
    logging.basicConfig(
        level=arguments.log_level, format="%(asctime)s loader-serve %(levelname)s %(message)s", stream=sys.stderr
    )
    return _guarded("loader-serve", lambda: command.check(arguments) if arguments.check else command.serve(arguments))


def prepare(argv: list[str] | None = None) -> int:
    """`loader-prepare`."""
    from loader_service.prepare.command import main

    return _guarded("loader-prepare", lambda: main(argv))


def inspect(argv: list[str] | None = None) -> int:
    """`loader-inspect`."""
    from loader_service.inspection.command import main

    return _guarded("loader-inspect", lambda: main(argv))


def batch(argv: list[str] | None = None) -> int:
    """`stoker-batch`."""
    from loader_service.replay.command import main

    return _guarded("stoker-batch", lambda: main(argv))


def doctor(argv: list[str] | None = None) -> int:
    """`loader-doctor`. Its exit code says what it found."""
    from loader_service.doctor.command import main

    return _guarded("loader-doctor", lambda: main(argv))


def top(argv: list[str] | None = None) -> int:
    """`loader-top`."""
    from loader_service.top.command import main

    return _guarded("loader-top", lambda: main(argv))


def convert(argv: list[str] | None = None) -> int:
    """`loader-convert`."""
    from loader_service.convert.command import main

    return _guarded("loader-convert", lambda: main(argv))


def keys(argv: list[str] | None = None) -> int:
    """`loader-keys`."""
    from loader_service.server.keys import main

    return _guarded("loader-keys", lambda: main(argv))


def _guarded(program: str, run: Callable[[], object]) -> int:
    """Returns the exit code: that of `run`, 0 where it has none; 1 after a StokerError, printed as one line, or a closed output
    pipe; 130 after Ctrl-C."""
    raise_descriptor_limit()
    heed_interrupts()
    try:
        code = run()
    except StokerError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output (`head`) has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if (trouble := host_error(error)) is None:
            raise
        print(f"{program}: {trouble}", file=sys.stderr)
        return 1
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    commands = {
        "serve": serve,
        "prepare": prepare,
        "inspect": inspect,
        "batch": batch,
        "doctor": doctor,
        "top": top,
        "convert": convert,
        "keys": keys,
    }
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(f"usage: python -m loader_service.cli {{{','.join(commands)}}} ...")
    sys.exit(commands[sys.argv[1]](sys.argv[2:]))
