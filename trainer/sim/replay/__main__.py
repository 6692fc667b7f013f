"""`python -m trainer.sim.replay`."""

import sys

from trainer.sim.replay.command import main

sys.exit(main())
