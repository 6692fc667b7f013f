"""Finds loaders: the entries of cluster.loader_addresses -> addresses to connect to.

    tcp://HOST:PORT      itself
    dns://NAME:PORT      tcp://IP:PORT for each address record of the name (a headless service, `docker compose --scale`)
    file:PATH            each line of the file that is not empty and no # comment: tcp://HOST:PORT

Names are looked up and files are read again and again, so loaders may join and leave during a run. A look that fails changes
nothing: what was found last stays.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stoker_proto.config.cluster import parse_dns_entry, parse_file_entry
from stoker_proto.errors import ConfigError
from stoker_proto.host.names import look_up_host
from stoker_proto.wire.peer_text import plain

logger = logging.getLogger(__name__)

MOST_ADDRESSES = 1024
"""Of all entries together; a longer list is cut, with a warning."""
_MOST_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Found:
    """What one look found."""

    addresses: tuple[str, ...]
    """tcp://HOST:PORT of all entries, in their order, each once."""
    not_found: dict[str, str]
    """Entry that names no address now -> why."""


class Discovery:
    """Looks at once, and again every interval, in a thread of its own: a name server may take its time to answer."""

    def __init__(self, entries: Sequence[str], interval_s: float, tell: Callable[[Found], None]) -> None:
        """tell: is called with each result that differs from the last one."""
        self._entries, self._interval_s, self._tell = entries, interval_s, tell
        self._last: dict[str, tuple[str, ...]] = {}
        self._warned: dict[str, str] = {}
        self._is_cut = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stoker-discovery", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """Look no more. Does not wait for a name server."""
        self._stop.set()

    def look(self) -> Found:
        """Look once."""
        addresses: dict[str, None] = {}  # an ordered set
        not_found = {}
        for entry in self._entries:
            try:
                self._last[entry] = look_up(entry)
                self._warned.pop(entry, None)
            except (OSError, ConfigError) as error:
                reason = plain(str(error), 200)
                if entry not in self._last:
                    not_found[entry] = reason
                elif self._warned.get(entry) != reason:
                    logger.warning("%s: %s; the %d loaders found last stay", entry, reason, len(self._last[entry]))
                    self._warned[entry] = reason
            found = self._last.get(entry, ())
            if not found:
                not_found.setdefault(entry, "no line names an address")
            addresses.update(dict.fromkeys(found))
        is_cut, was_cut = len(addresses) > MOST_ADDRESSES, self._is_cut
        self._is_cut = is_cut
        if is_cut and not was_cut:  # said once, not at each look
            logger.warning(
                "cluster.loader_addresses names %d loaders: the first %d are used", len(addresses), MOST_ADDRESSES
            )
        return Found(tuple(addresses)[:MOST_ADDRESSES], not_found)

    def _run(self) -> None:
        told = None
        while not self._stop.is_set():
            found = self.look()
            if found != told and not self._stop.is_set():
                self._tell(found)
                told = found
            self._stop.wait(self._interval_s)


def is_fixed(entry: str) -> bool:
    """Whether the entry is an address itself."""
    return parse_dns_entry(entry) is None and parse_file_entry(entry) is None


def look_up(entry: str) -> tuple[str, ...]:
    """The addresses that an entry names now. Raises OSError (name server, file) or ConfigError (a line of the file)."""
    if dns := parse_dns_entry(entry):
        return _resolve(*dns)
    if file := parse_file_entry(entry):
        return _read(Path(file))
    return (entry,)


def _resolve(name: str, port: int) -> tuple[str, ...]:
    found = look_up_host(name, port, type=socket.SOCK_STREAM)
    hosts = sorted({str(address[0]) for _, _, _, _, address in found})
    return tuple(f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}" for host in hosts)


def _read(path: Path) -> tuple[str, ...]:
    with path.open("rb") as file:
        content = file.read(_MOST_FILE_BYTES + 1)
    if len(content) > _MOST_FILE_BYTES:
        raise ConfigError(f"{path}: more than {_MOST_FILE_BYTES} bytes")
    addresses = []
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
        address = line.partition("#")[0].strip()
        if not address:
            continue
        host, separator, port = address.removeprefix("tcp://").rpartition(":")
        if not (address.startswith("tcp://") and host and separator and port.isdecimal() and 0 < int(port) < 65536):
            raise ConfigError(f"{path}:{number}: {plain(line, 80)!r} is not tcp://HOST:PORT")
        addresses.append(address)
    return tuple(addresses)
