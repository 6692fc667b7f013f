"""A rank that pulls the epochs 0, 1, 2, 0, 1, ... until its standard input ends; one line of JSON for each.

python -m tests.end_to_end.faults.soak_client CONFIG STEP_S ADDRESS ...
{"epoch": 1, "digest": "9f0c...", "longest_wait_s": 0.31, "steps": 70}
"""

from __future__ import annotations

import hashlib
import json
import select
import sys
import time
from itertools import cycle

from stoker_proto.config.reader import load_config
from tests.end_to_end.faults.run import PATIENCE
from trainer.feed.feed import Feed

EPOCHS = 3


def main() -> None:
    """One feed for all epochs: it reads ahead over their borders, and drops what it read where epoch 0 comes again."""
    path, step_s, *addresses = sys.argv[1:]
    overrides = [f"cluster.loader_addresses=[{','.join(addresses)}]", f"trainer.epochs={EPOCHS}", *PATIENCE]
    with Feed(load_config(path, overrides), "train", 0, 1) as feed:
        feed.connect()
        for epoch in cycle(range(EPOCHS)):
            digest, longest, steps = hashlib.sha256(), 0.0, 0
            for batch in feed.steps(epoch, 0):
                time.sleep(float(step_s))
                for micro_batch in batch.micro_batches:
                    digest.update(micro_batch.digest)
                longest, steps = max(longest, batch.wait_s), steps + 1
            line = {"epoch": epoch, "digest": digest.hexdigest(), "longest_wait_s": longest, "steps": steps}
            print(json.dumps(line), flush=True)
            if select.select([sys.stdin], [], [], 0)[0]:
                return


if __name__ == "__main__":
    main()
