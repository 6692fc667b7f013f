"""The trainer's entry point: `deepspeed trainer/main.py --config FILE [--set a.b=value ...]`. Build, run, close.

An installed package has the command `stoker-train`, which is the same for one rank.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def use_source_roots() -> None:
    """Replace this file's own folder on the path by the repository's source roots.

    Python puts a script's folder first on the path. Then everything under `trainer/` could be imported as a top-level module
    and hide an installed one. `stoker_proto` is under `proto/`.
    """
    here = Path(__file__).resolve().parent
    # An installed package's parent is on the path already, in its place: after the standard library.
    roots = [str(here.parent), str(here.parent / "proto")] if (here.parent / "proto").is_dir() else []
    if sys.path and Path(sys.path[0] or ".").resolve() == here:
        sys.path[:1] = roots
    else:
        sys.path[:0] = [root for root in roots if root not in sys.path]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0; 1 after one line on stderr with the error and the way out, or a failed `--check`; 130 after
    Ctrl-C; where the run was stopped before its end and saved: 143 by SIGTERM, 75 by SIGUSR1 or `trainer.max_time`."""
    from stoker_proto.errors import StokerError
    from stoker_proto.host.descriptors import raise_descriptor_limit
    from trainer.cli import parse_arguments, read_config, report_error, set_up_logging
    from trainer.process.allocator import keep_freed_memory
    from trainer.process.parents import DeepSpeedParents
    from trainer.process.signals import StopSignals

    set_up_logging()
    raise_descriptor_limit()
    keep_freed_memory()
    stop_signals = StopSignals(DeepSpeedParents.find())
    trainer = None
    try:
        options = parse_arguments(arguments)
        if options.start_within_s is not None:
            await_loaders(options)
        config = read_config(options)
        if options.plan:
            from trainer.plan.command import print_plan

            return print_plan(config, options)
        if options.check:
            from trainer.check import check_run

            return 0 if check_run(config) else 1
        from trainer.build import (
            build_trainer,  # imports torch and DeepSpeed, which takes seconds: a mistyped option shows first
        )

        trainer = build_trainer(config)
        stop_signals.describe_run = trainer.describe_position
        trainer.stop_signal = lambda: stop_signals.requested
        stop_signals.begin_training(config.trainer.checkpoint.stop_grace_s)
        trainer.run()
    except StokerError as error:
        if trainer is not None:
            trainer.close(failed=True)
        report_error(error)
        return 1
    except KeyboardInterrupt:  # `stop_signals` has logged where the run stood
        if trainer is not None:
            trainer.close(failed=True)
        return 130
    except BaseException:
        if trainer is not None:
            trainer.close(failed=True)
        raise
    trainer.close()
    return trainer.exit_code


def await_loaders(options: argparse.Namespace) -> None:
    """Prepare what needs no data, wait for the launcher's word, then continue as if `--set` had named the loaders.

    Raises ConfigError, DeadlineError.
    """
    from trainer.cli import read_config
    from trainer.process.early import prepare_and_wait

    def prepare() -> None:
        config = read_config(options)
        from trainer.build import check_model_and_packages  # imports all that a run needs, which is what takes the time

        check_model_and_packages(config)

    start = prepare_and_wait(prepare, options.start_within_s)
    options.set.append(f"cluster.loader_addresses={json.dumps(start.loader_addresses)}")
    os.environ["MASTER_PORT"] = str(start.master_port)


if __name__ == "__main__":
    use_source_roots()
    sys.exit(main())
