"""`loader`: how a loader uses its host."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from stoker_proto.config.rules import allowed, at_least

_DEVICE = re.compile(r"cpu|torch|cuda(:\d{1,3})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderConfig:
    """How a loader uses its host. Nothing here but `device` and `jpeg` changes what is in a batch."""

    cores: int = field(default=0, metadata=at_least(0))
    """Cores to use; 0: all that the process may use. `deploy/launch.py` divides a node's cores among its loaders."""
    workers: int = field(default=0, metadata=at_least(0))
    """Processes that build pieces; 0: one per four cores. With 1, the pieces are built by threads of the loader's own process."""
    threads: int = field(default=0, metadata=at_least(0))
    """Threads per worker; decoding releases the interpreter lock. 0: the cores divided by the workers."""
    cache_mb: int = field(default=1024, metadata=at_least(1))
    """Memory for encoded frames over all workers, in MiB."""
    disk_cache_gb: float = field(
        default=0.0,
        metadata=allowed("write 0 to turn it off, or at least 0.01", lambda size: size == 0 or 0.01 <= size < 1e9),
    )
    """Disk for encoded records that outlive the run, in GB (10**9 bytes); 0: none. A later run, or a loader that is started
    again, reads them instead of decoding. The limit is that of the folder, which all loaders of a host share."""
    disk_cache_dir: str | None = None
    """Folder of these records; null: `encoded` in data.cache_dir, or else ~/.cache/stoker/encoded."""
    unread_mb: int = field(default=1024, metadata=at_least(1))
    """Memory for answers that ranks have not read yet, over all ranks, in MiB. One rank may use a quarter of it."""
    read_ahead: bool = True
    """Decode a lane's next records before a rank asks for them."""
    device: str = field(
        default="cpu",
        metadata=allowed("write cpu, cuda, cuda:1 or torch", lambda device: _DEVICE.fullmatch(device) is not None),
    )
    """What resizes frames and makes JPEGs. `cpu`: SIMD libraries. `cuda`, `cuda:1`: this GPU, many frames at once (needs the
    extra `gpu`); `deploy/launch.py` gives each loader the device of its `dataloader` slot. `torch`: the GPU's code on the CPU,
    to compare. Pixels of a GPU differ from those of the CPU by less than one level on average."""
    jpeg: Literal["host", "device"] = "host"
    """Where a loader with a GPU makes JPEGs. `host`: TurboJPEG, as a CPU loader. `device`: nvJPEG of torchvision. It keeps
    colours at full resolution: JPEGs are about 40% larger, and pixels some levels from those that a policy sees on a CPU."""
    allow_mixed_devices: bool = False
    """Let loaders with different `device` or libraries serve one run. Then pixels depend on which loader answers: batches are no
    longer the same in each run."""
