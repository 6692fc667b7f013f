"""The path templates of info.json, filled in without Python's format language: known fields, and digits to pad to.

    data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet      chunk_index=0, file_index=12
    data/chunk-000/file-012.parquet

`str.format` would let a data set write `{video_key.__class__...}` or pad to a billion characters.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePosixPath

from stoker_proto.errors import DataError

_FIELD = re.compile(r"\{([a-z_]+)(?::0?([0-9]{1,2})d?)?\}")


@dataclass(frozen=True, slots=True)
class PathTemplate:
    """A relative path with numbers and a camera's name left open."""

    text: str
    fields: frozenset[str]

    @classmethod
    def parse(cls, text: object, known: Collection[str]) -> PathTemplate:
        """Raises DataError: no text, an unknown or missing field, or a path that leads out of its folder."""
        if not isinstance(text, str) or not text:
            raise DataError(f"{text!r}: a path with {_braced(known)} in it is expected")
        found = [match[1] for match in _FIELD.finditer(text)]
        if re.search(r"[{}]", _FIELD.sub("", text)):
            raise DataError(
                f"{text!r}: only {_braced(known)} may stand in braces, with `:03d` or the like for the number of digits"
            )
        unknown = sorted(set(found) - set(known))
        if unknown:
            raise DataError(f"{text!r}: unknown field {_braced(unknown)}; {_braced(known)} may stand here")
        path = PurePosixPath(text)
        if path.is_absolute() or ".." in path.parts or "\0" in text or "\\" in text:
            raise DataError(f"{text!r} leads out of the data set's folder, and nothing outside of it is read")
        return cls(text, frozenset(found))

    def fill(self, **values: int | str) -> str:
        """The path; values: at least the fields that stand in it."""

        def one(match: re.Match[str]) -> str:
            value, digits = values[match[1]], match[2]
            return f"{value:0{int(digits)}d}" if digits and isinstance(value, int) else str(value)

        return _FIELD.sub(one, self.text)


def _braced(names: Collection[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in sorted(names))
