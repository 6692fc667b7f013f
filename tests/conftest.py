"""For the whole suite, before any test module imports torch."""

from __future__ import annotations

import os

# Ranks are forked from this process. A thread pool that torch's OpenMP started here would not exist in a rank, which would
# then wait for it for ever; and the ranks share the cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the same for tokenizers, which else warns after a fork
