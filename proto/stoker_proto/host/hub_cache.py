"""Where Hugging Face's tools put a downloaded model on this machine. Read only; nothing is downloaded.

$HF_HUB_CACHE, else $HF_HOME/hub, else $XDG_CACHE_HOME/huggingface/hub, else ~/.cache/huggingface/hub
    models--openvla--openvla-7b/
        refs/main                       the commit that "main" was at the download
        snapshots/{commit}/config.json  links into blobs/
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_COMMIT = re.compile(r"[0-9a-f]{7,64}")
_MAX_REF_BYTES = 128


def find_model_folder(name: str) -> Path:
    """The folder that `name` means: itself where it exists or is no hub id, else the downloaded snapshot of that hub id.

    A path wins over a hub id. Where neither is there, the path is returned, and whoever reads it raises an error with
    `explain_missing`.
    """
    folder = Path(name)
    if folder.exists() or not is_hub_id(name):
        return folder
    return find_snapshot(name) or folder


def is_hub_id(name: str) -> bool:
    """Whether the name can be that of a repository on the hub, `owner/name`. Paths of two folders can be one, too."""
    return _HUB_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def hub_id_of(name: str) -> str | None:
    """The hub id that `name` means by the rule of `find_model_folder`; None for a folder."""
    return name if is_hub_id(name) and not Path(name).exists() else None


def find_snapshot(hub_id: str) -> Path | None:
    """The downloaded snapshot of a model's main branch; None where it is not in the cache."""
    folder = hub_cache() / f"models--{hub_id.replace('/', '--')}"
    try:
        with (folder / "refs" / "main").open("rb") as file:
            commit = file.read(_MAX_REF_BYTES).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if _COMMIT.fullmatch(commit) and snapshot.is_dir() else None


def hub_cache() -> Path:
    """The cache's folder, by the same variables as huggingface_hub reads."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    general = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface"
    return Path(os.environ.get("HF_HOME") or general).expanduser() / "hub"


def explain_missing(name: str) -> str:
    """Text for an error: the way out where `find_model_folder(name)` is not there."""
    if not is_hub_id(name):
        return "name the folder of a downloaded model (config.json, weights, tokenizer.json)"
    return (
        f"as the id of a model on the hub it is not in {hub_cache()} either: download it on each machine that runs loaders or "
        f"ranks with `hf download {name}`, or name a model's folder"
    )
