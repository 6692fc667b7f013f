"""Runs the plan given as JSON through the launcher's own code: `python run_plan.py '{"loaders": {"commands": ...}, ...}'`.

The trainer waits on stdin for the loaders' addresses, if there are loaders.
"""

import json
import os
import sys
from pathlib import Path

from deploy.keeper import run_kept
from deploy.loaders import LoaderPlan
from deploy.node import Plan, run_node


def main() -> int:
    fields = json.loads(sys.argv[1])
    trainer, loaders = fields.pop("trainer"), fields.pop("loaders")
    commands = tuple(tuple(command) for command in loaders.pop("commands"))
    plan = Plan(
        **{**fields, "completion_record": Path(fields["completion_record"])},
        loaders=LoaderPlan(**loaders, commands=commands, environment=dict(os.environ)),
        trainer=trainer,
        trainer_environment=dict(os.environ),
        cores="shared",
    )
    return run_kept(lambda signals: run_node(plan, signals))


if __name__ == "__main__":
    sys.exit(main())
