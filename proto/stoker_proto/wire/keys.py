"""Key files of the encrypted wire (CURVE): one line of JSON each, never overwritten, and checked when read.

    loader.key          {"format": "stoker-curve-1", "name": "loader", "public": "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID"}
    loader.key_secret   {"format": "stoker-curve-1", "name": "loader", "secret": "D:)Q[IlAW!ahhC2ac:9*A}h:p?([4%wOTJ%JR%cs"}

A key is 32 bytes as 40 characters of Z85 (ZeroMQ RFC 32). A secret that group or others can read is refused.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stoker_proto.config.security import SecurityConfig
from stoker_proto.errors import ConfigError

PUBLIC_SUFFIX, SECRET_SUFFIX = ".key", ".key_secret"
_FORMAT = "stoker-curve-1"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_Z85 = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_LARGEST_FILE_BYTES = 4096
_Kind = Literal["public", "secret"]


@dataclass(frozen=True, slots=True)
class Key:
    """One half of a key pair, with its name."""

    name: str
    value: bytes

    def __repr__(self) -> str:
        """Without the key, so that no log shows a secret."""
        return f"Key({self.name!r})"


def loader_keys(security: SecurityConfig) -> tuple[Key, dict[bytes, str]] | None:
    """A loader's secret key and the ranks it admits (public key -> name); None without keys. Raises ConfigError."""
    if security.loader_secret is None:
        return None
    return read_secret(security.loader_secret), read_allowed(security.allowed_ranks)


def rank_keys(security: SecurityConfig) -> tuple[Key, Key] | None:
    """A rank's secret key and the loaders' public key; None without keys. Raises ConfigError."""
    if security.rank_secret is None or security.loader_key is None:
        return None
    return read_secret(security.rank_secret), read_public(security.loader_key)


def write_pair(folder: Path, name: str, public: bytes, secret: bytes) -> tuple[Path, Path]:
    """Write NAME.key and NAME.key_secret (mode 0600) into the folder, made with mode 0700 if missing. Never overwrites a file.

    Raises ConfigError.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"--name {name!r}: at most 64 letters, digits, dots, dashes and underscores, a letter or digit first"
        )
    paths = folder / f"{name}{PUBLIC_SUFFIX}", folder / f"{name}{SECRET_SUFFIX}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = stat.S_IMODE(folder.stat().st_mode)
        if mode & 0o022:
            raise ConfigError(f"{folder} has mode {mode:04o}: others may put keys there; chmod 700 {folder}")
        for path in paths:
            if os.path.lexists(path):
                raise ConfigError(
                    f"{path} is there already, and keys are never overwritten: choose another --name or --out"
                )
        _write_new(paths[1], _encode(name, "secret", secret), 0o600)
        _write_new(paths[0], _encode(name, "public", public), 0o644)
    except OSError as error:
        raise ConfigError(f"{folder}: the key pair {name} cannot be written ({error}); choose another --out") from error
    return paths


def read_public(path: str | Path) -> Key:
    """The key of a public file. Raises ConfigError."""
    return _decode(path, _read(path, secret=False), "public")


def read_secret(path: str | Path) -> Key:
    """The key of a secret file that only its owner can read. Raises ConfigError."""
    return _decode(path, _read(path, secret=True), "secret")


def read_allowed(paths: Iterable[str]) -> dict[bytes, str]:
    """Public key -> name, from files and from all `*.key` files in folders. Raises ConfigError where a folder has none."""
    allowed: dict[bytes, str] = {}
    for path in map(Path, paths):
        files = sorted(path.glob(f"*{PUBLIC_SUFFIX}")) if path.is_dir() else [path]
        if not files:
            raise ConfigError(
                f"{path} holds no *{PUBLIC_SUFFIX} file: no rank could connect; make one with loader-keys"
            )
        for file in files:
            key = read_public(file)
            allowed[key.value] = key.name
    return allowed


def _encode(name: str, kind: _Kind, value: bytes) -> bytes:
    return json.dumps({"format": _FORMAT, "name": name, kind: value.decode("ascii")}).encode() + b"\n"


def _decode(path: str | Path, data: bytes, kind: _Kind) -> Key:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict) or tree.get("format") != _FORMAT:
        raise ConfigError(f"{path} is no key file of format {_FORMAT}: make one with loader-keys")
    if kind not in tree:
        other, suffix = ("secret", PUBLIC_SUFFIX) if kind == "public" else ("public", SECRET_SUFFIX)
        raise ConfigError(f"{path} holds no {kind} key (a {other} one?): name the file that ends in {suffix}")
    name, value = tree.get("name"), tree[kind]
    if not (isinstance(name, str) and _NAME.fullmatch(name) and isinstance(value, str) and _Z85.fullmatch(value)):
        raise ConfigError(
            f"{path}: its {kind} key is damaged (a name, and 40 characters of Z85): make a new pair with loader-keys"
        )
    return Key(name, value.encode())


def _read(path: str | Path, *, secret: bool) -> bytes:
    try:
        with Path(path).open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if secret and mode & ~_mode_allowed(path):
                raise ConfigError(
                    f"{path} has mode {mode:04o}: a secret key must be readable by its owner alone; chmod 600 {path}, and make a "
                    "new pair if someone else may have read it"
                )
            return file.read(_LARGEST_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"{path}: the key file cannot be read ({error}); make a pair with loader-keys") from error


def _mode_allowed(path: str | Path) -> int:
    """0700; for systemd's credentials 0740, because the group bits of a file with an access list are the list's mask."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    return 0o740 if folder and Path(path).absolute().is_relative_to(folder) else 0o700


def _write_new(path: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)
