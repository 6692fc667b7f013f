"""URLs in the data paths, and the places of their files' copies on this host.

    s3://robots/bridge/train.jsonl  <->  {cache}/remote/s3-robots-5d0f3a61/bridge/train.jsonl

A host's (or bucket's) files keep their paths. So the copy of a file beside a shard lies beside the shard's copy. The hash is of
the protocol, the host and the options: the same bucket name at another endpoint is another bucket.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stoker_proto.errors import ConfigError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_WITHOUT_HOST = ("file", "local", "memory")
_HTTP = ("http", "https")
_MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Place:
    """A URL, taken apart."""

    protocol: str
    host: str
    """Host and port, or bucket; empty where the protocol has none."""
    key: str
    """The rest of the URL, without slashes at its ends."""

    @property
    def has_listing(self) -> bool:
        """Whether folders can be listed."""
        return self.protocol not in _HTTP

    @property
    def has_wildcards(self) -> bool:
        """Whether the key is a glob."""
        return self.has_listing and bool(_MAGIC.search(self.key))

    @property
    def folder_key(self) -> str:
        """The part of the key before its first wildcard, by folders."""
        parts = []
        for part in self.key.split("/"):
            if _MAGIC.search(part):
                break
            parts.append(part)
        return "/".join(parts)

    def url(self, key: str | None = None) -> str:
        """The URL of this key, or of another key at the same host."""
        key = self.key if key is None else key
        if self.protocol in _WITHOUT_HOST:
            return f"{self.protocol}:///{key}"
        if self.protocol in _HTTP:  # in a file name these are plain characters
            key = key.replace("?", "%3F").replace("#", "%23")
        return f"{self.protocol}://{self.host}/{key}"

    def folder_name(self, options: Mapping[str, Any]) -> str:
        """The folder below `{cache}/remote` with the host's files."""
        identity = json.dumps([self.protocol, self.host, options], sort_keys=True, default=str)
        digest = hashlib.blake2b(identity.encode(), digest_size=4).hexdigest()
        host = re.sub(r"[^A-Za-z0-9._-]", "_", self.host)[:64]
        return f"{self.protocol}-{host}-{digest}" if host else f"{self.protocol}-{digest}"


def is_url(path: str) -> bool:
    """Whether an entry of the data paths is a URL.

    >>> is_url("s3://bucket/demos"), is_url("/data/demos")
    (True, False)
    """
    return "://" in path and _SCHEME.match(path) is not None


def parse_url(url: str) -> Place:
    """The URL's parts. Raises ConfigError for a URL that cannot be fetched, or that holds credentials."""
    match = _SCHEME.match(url)
    if match is None:
        raise ConfigError(f"{url!r} is no URL: PROTOCOL://... is expected")
    protocol, rest = match[1].lower(), url[match.end() :]
    shown = f"{protocol}://{rest.rpartition('@')[2].partition('?')[0]}"  # without what may be secret
    if "::" in url:
        raise ConfigError(f"{shown!r}: chains of file systems (::) are not read; name the files themselves")
    if protocol in _WITHOUT_HOST:
        host, key = "", rest
    else:
        host, _, key = rest.partition("/")
        if "@" in host:
            raise ConfigError(
                f"{shown!r} carries a user or a password: leave them out, credentials come from the environment (or "
                "fsspec's own configuration)"
            )
        if not host:
            raise ConfigError(f"{shown!r} names no host or bucket: {protocol}://HOST/... is expected")
    if protocol in _HTTP and ("?" in key or "#" in key):
        raise ConfigError(
            f"{shown!r} has a query or a fragment: only plain URLs of files are read; name the file itself"
        )
    key = key.strip("/")
    if key and check_name(key) is not None:
        raise ConfigError(f"{shown!r}: {check_name(key)}; write the plain path")
    return Place(protocol, host, key)


def check_name(name: str) -> str | None:
    """Why a listed name cannot be the name of a local file; None if it can."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\0" in name:
        return "an empty part, . or .. in its name"
    if any(len(part.encode()) > 255 for part in parts):
        return "a part of its name is longer than 255 bytes"
    return None
