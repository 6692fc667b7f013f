"""Ranks as forked processes: torch and DeepSpeed are imported once, in the parent."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import queue
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch

from stoker_proto.host.ports import free_port

DEADLINE_S = 300.0

_WANTED = (  # what DeepSpeed and transformers import only when an engine is made: 2 s of CPU in every rank otherwise
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "torch.utils.tensorboard.writer",
    "transformers.models.clip.modeling_clip",
    "transformers.models.idefics3.modeling_idefics3",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
    "transformers.integrations.deepspeed",
)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # theirs
    for _name in _WANTED:
        importlib.import_module(_name)


def run_ranks(world_size: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work(rank)` gives in each of `world_size` processes that can meet. AssertionError with a rank's traceback."""
    assert torch.get_num_threads() == 1, "torch has threads that a fork loses: see tests/conftest.py"
    context = multiprocessing.get_context("fork")
    port = free_port()
    results: Any = context.Queue()

    def child(rank: int) -> None:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        warnings.simplefilter("ignore")  # DeepSpeed and transformers warn of their own ways; ours are checked elsewhere
        try:
            results.put((rank, work(rank), None))
        except BaseException:  # noqa: BLE001  (the process's edge: the parent shows it)
            results.put((rank, None, traceback.format_exc()))
        results.close()
        results.join_thread()
        os._exit(0)  # no destructor of a process group waits for a rank that is gone

    processes = [context.Process(target=child, args=(rank,)) for rank in range(world_size)]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        while len(found) < world_size:
            try:
                rank, value, failure = results.get(timeout=DEADLINE_S)
            except queue.Empty:
                raise AssertionError(f"ranks {sorted(set(range(world_size)) - found.keys())} gave no answer") from None
            assert failure is None, f"rank {rank}:\n{failure}"
            found[rank] = value
    finally:
        for process in processes:
            if len(found) < world_size:
                process.kill()
            process.join()
    return [found[rank] for rank in range(world_size)]
