"""DeepSpeed: where the ranks meet, its settings from our config, and the engine around a model.

What is peculiar to DeepSpeed is here. For example, a CPU rank that loads `deepspeed_shm_comm` compiles C++ for minutes, and a
plain `{"type": "AdamW"}` compiles `fused_adam`.
"""

from __future__ import annotations

import functools
import ipaddress
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from stoker_proto.config import Config, check_batch_arithmetic
from stoker_proto.errors import ConfigError
from trainer.engine.optimizer import make_optimizer
from trainer.engine.ranks import Ranks

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before the first import of deepspeed

import deepspeed
import deepspeed.ops
from deepspeed.utils import lazy_init_hp_params_optimizer_state, safe_get_full_optimizer_state

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # its import sets it to INFO: pages of settings per rank

Engine: TypeAlias = Any
"""deepspeed.DeepSpeedEngine, which comes without types."""


def join_ranks(timeout_s: float = 1800.0) -> Ranks:
    """Meet the other ranks (NCCL between GPUs, gloo between CPUs). Without a launcher: a world of one.

    timeout_s: longest wait in a collective operation.
    """
    timeout = timedelta(seconds=timeout_s)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {rank} is number {local_rank} on a machine of {torch.cuda.device_count()} GPUs: start as many ranks "
                "as there are GPUs"
            )
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        # In the module's own table, as asking for it makes DeepSpeed try its operators with a compiler.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
        if "OMP_NUM_THREADS" not in os.environ:  # or every rank would take every core
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if not dist.is_initialized() and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)  # type: ignore[attr-defined]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    elif not dist.is_initialized() and _is_loopback(os.environ["MASTER_ADDR"]):
        _meet_on_loopback(backend, rank, world_size, timeout)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    return Ranks(rank=rank, world_size=world_size, local_rank=local_rank, device=device)


def _is_loopback(host: str) -> bool:
    """Whether ranks that meet there are all on this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _meet_on_loopback(backend: str, rank: int, world_size: int, timeout: timedelta) -> None:
    """Nobody else can reach the ranks: torch's own store listens on all interfaces, gloo and NCCL on that of the host's name."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")
    port, listener = int(os.environ["MASTER_PORT"]), None
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        listener = socket.create_server(("127.0.0.1", port), backlog=2048).detach()  # the store closes it
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1",
        port,
        world_size,
        is_master=listener is not None,
        timeout=timeout,
        master_listen_fd=listener,
    )
    named = dist.PrefixStore("default_pg", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=named, rank=rank, world_size=world_size, timeout=timeout)


def leave_ranks() -> None:
    """Let go of the other ranks; only after work that all of them finished."""
    if dist.is_initialized():
        dist.destroy_process_group()


def deepspeed_settings(config: Config, *, world_size: int, hidden_size: int, universal: bool = False) -> dict[str, Any]:
    """What `deepspeed.initialize` is told. hidden_size: width of the language model, for the sizes of buckets."""
    trainer = config.trainer
    accumulation = check_batch_arithmetic(trainer.global_batch_size, trainer.micro_batch_size, world_size)
    zero: dict[str, Any] = {
        "stage": trainer.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": torch.cuda.is_available(),
    }
    if trainer.zero_stage == 3:
        zero |= {
            "reduce_bucket_size": max(hidden_size * hidden_size, 1 << 20),
            "stage3_prefetch_bucket_size": max(int(0.9 * hidden_size * hidden_size), 1 << 20),
            "stage3_param_persistence_threshold": 10 * hidden_size,
        }
    if trainer.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    settings: dict[str, Any] = {
        "train_batch_size": trainer.global_batch_size,
        "train_micro_batch_size_per_gpu": trainer.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": trainer.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW also where its states are offloaded: nothing to compile
        "steps_per_print": 1 << 62,
        "checkpoint": {"load_universal": universal},
    }
    if config.model.precision == "bf16":
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = trainer.reduce_dtype
    return settings


@contextmanager
def partitioned_loading(settings: dict[str, Any]) -> Iterator[None]:
    """Inside, `from_pretrained` builds a model that is partitioned over the ranks from the start (ZeRO-3 only).

    Afterwards transformers forgets the settings, so that a later ordinary load is ordinary.
    """
    if settings["zero_optimization"]["stage"] != 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    keep_alive = HfDeepSpeedConfig(settings)  # transformers holds only a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del keep_alive


def import_muon() -> None:
    """Import DeepSpeed's Muon, which ZeRO looks for whatever the optimizer is, without torch's compiler.

    Two of its functions are decorated by `torch.compile`. That alone imports torch._inductor: 3.5 CPU s of each rank's start.
    """
    with compiled_at_first_call():
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401


@contextmanager
def compiled_at_first_call() -> Iterator[None]:
    """Inside, `torch.compile` compiles a function when it is called for the first time."""
    compile_now = torch.compile

    def compile_later(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if function is None:
            return functools.partial(compile_later, **options)
        compiled: list[Callable[..., Any]] = []

        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            if not compiled:
                compiled.append(compile_now(function, **options))
            return compiled[0](*arguments, **keywords)

        return call

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now


def wrap(model: torch.nn.Module, config: Config, settings: dict[str, Any]) -> Engine:
    """The engine that partitions, averages, clips and steps, with torch's AdamW inside."""
    import_muon()
    optimizer = make_optimizer(model, config.trainer)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    engine.train()  # `from_pretrained` gives a model in evaluation mode: no dropout, no gradient checkpointing
    return engine


def link_optimizer_states(engine: Engine) -> None:
    """Let `full_optimizer_state` find the states of today: below ZeRO-3, DeepSpeed 0.19 links those of the first group only."""
    optimizer = engine.optimizer
    for parameters, flat in zip(
        getattr(optimizer, "bit16_groups", ()), getattr(optimizer, "single_partition_of_fp32_groups", ()), strict=True
    ):
        lazy_init_hp_params_optimizer_state(parameters, flat, optimizer.optimizer.state)


def full_optimizer_state(parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
    """float32: an optimizer state of one trained parameter, gathered from all ranks, which must all call this."""
    found: torch.Tensor = safe_get_full_optimizer_state(parameter, key)
    return found


def set_learning_rate(engine: Engine, rate: float) -> None:
    """For the next step: `rate` where parameters have the rate of all, and in proportion in groups with another peak."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
