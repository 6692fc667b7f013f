"""`code`: files of source code in tables, as the-stack and StarCoder's data have them, for plain language modelling.

    {"content": "print(1)\n", "lang": "Python", "ext": "py", "size": 9, "max_stars_repo_name": "a/b",
     "max_stars_repo_path": "c/d.py", "max_stars_repo_licenses": ["MIT"], "max_stars_count": 12}

With `repo_metadata` a file begins as StarCoder's do: <reponame>a/b<filename>c/d.py<gh_stars>10-100, a line feed, the content.
A file whose own content holds one of these tokens gets no metadata, so that tokens cannot be forged; such files are counted.

Files that a filter leaves out keep their place as records without a sample; loader-prepare counts them by reason.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal, NamedTuple

from loader_service.sources.base import Sample
from loader_service.sources.fields import PREFERENCES, refuse_preferences, unread
from loader_service.sources.half_characters import refuse_half
from loader_service.sources.options import read_options
from loader_service.sources.tables.dataset import TableDataset
from stoker_proto.config import DataConfig
from stoker_proto.errors import ConfigError, DataError
from stoker_proto.hashing import key64

_ONE = 1 << 64
_LANGUAGE = ("lang", "language", "programming_language")
_LICENCES = ("max_stars_repo_licenses", "licenses", "license", "detected_licenses")
_REPO = ("max_stars_repo_name", "repo_name", "repository_name", "repo")
_PATH = ("max_stars_repo_path", "path", "file_path", "filename")
_STARS = ("max_stars_count", "stars", "star_events_count")
_METADATA = {"repo": _REPO, "file": _PATH, "stars": _STARS}
_USUAL = (*_LANGUAGE, *_LICENCES, *_REPO, *_PATH, *_STARS, "ext", "size")
"""Fields of which filters and metadata take what the options ask for."""
_HOLDS_TOKENS = "it holds one of the tokens of data.options.tokens: left without metadata and fill-in-the-middle"
_TOKENS = {
    "repo": "<reponame>",
    "file": "<filename>",
    "stars": "<gh_stars>",
    "prefix": "<fim_prefix>",
    "middle": "<fim_middle>",
    "suffix": "<fim_suffix>",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeOptions:
    """`data.options` of this dataset."""

    column: str = "content"
    """Holds the code."""
    languages: tuple[str, ...] = ()
    """Kept, by `lang` or `language`, in upper or lower case; empty: all."""
    extensions: tuple[str, ...] = ()
    """Kept, by `ext` or else the path's, without a dot; empty: all."""
    licences: tuple[str, ...] = ()
    """A file is kept if all its licences are among these, and it has one; empty: all files."""
    min_bytes: int = 0
    """Smaller files are left out."""
    max_bytes: int | None = None
    """Larger files are left out."""
    repo_metadata: bool = False
    """Put repository, path and stars in front."""
    fim_rate: float = 0.0
    """Part of the files, 0 to 1, that are rearranged for filling in the middle."""
    fim_spm_rate: float = 0.5
    """Part of those in the order suffix, prefix, middle; the others: prefix, suffix, middle."""
    tokens: dict[str, str] = field(default_factory=dict)
    """Special tokens by name: repo, file, stars, prefix, middle, suffix; default: StarCoder's."""
    validate: bool = False
    """Parse and check every row in loader-prepare, not only when it is read. Filters parse them anyway."""
    unpack_parquet: bool = False
    """Keep the needed columns of parquet files unpacked in the cache folder: quick random reads for room on the disk."""


class CodeDataset(TableDataset):
    """Files of code."""

    usual: ClassVar[Collection[str]] = _USUAL

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        self.options = options = read_options(CodeOptions, config.options, "code")
        for name in ("fim_rate", "fim_spm_rate"):
            if not 0 <= getattr(options, name) <= 1:
                raise ConfigError(f"data.options.{name} is {getattr(options, name)}: a part, from 0 to 1, is expected")
        if options.min_bytes < 0 or (options.max_bytes is not None and options.max_bytes < max(1, options.min_bytes)):
            raise ConfigError(
                f"data.options.min_bytes is {options.min_bytes} and max_bytes {options.max_bytes}: 0 <= min_bytes <= max_bytes "
                "is expected, and max_bytes of at least 1"
            )
        unknown = set(options.tokens) - set(_TOKENS)
        if unknown:
            raise ConfigError(
                f"data.options.tokens: {', '.join(sorted(unknown))} unknown; there are {', '.join(_TOKENS)}"
            )
        self._tokens = {**_TOKENS, **options.tokens}
        self._fim = FimTokens(*(self._tokens[name] for name in ("prefix", "middle", "suffix")))
        written = (*self._fim,) if options.fim_rate else ()
        self._written = written + tuple(self._tokens[name] for name in _METADATA if options.repo_metadata)
        self._languages = frozenset(map(str.lower, options.languages))
        self._extensions = frozenset(name.lower().lstrip(".") for name in options.extensions)
        self._licences = frozenset(map(str.lower, options.licences))
        self.validate, self.unpack_parquet = options.validate, options.unpack_parquet
        self._read = tuple(name for name in self.columns() if name not in PREFERENCES)
        """Fields that are read of a row."""
        self.filters = bool(
            self._languages or self._extensions or self._licences or options.min_bytes or options.max_bytes is not None
        )

    def scan_identity(self) -> dict[str, Any]:
        """The seed decides where files are cut for filling in the middle."""
        identity = super().scan_identity()
        return {**identity, "seed": self.config.order.seed} if self.options.fim_rate else identity

    def columns(self) -> tuple[str, ...]:
        """The content, and what filters and metadata look at."""
        columns = [self.options.column]
        if self._languages:
            columns += _LANGUAGE
        if self._extensions:
            columns += ["ext", *_PATH]
        if self._licences:
            columns += _LICENCES
        if self.options.repo_metadata:
            columns += [*_REPO, *_PATH, *_STARS]
        return tuple(dict.fromkeys((*columns, *PREFERENCES)))

    def needed_columns(self) -> tuple[str, ...]:
        """That of the options."""
        return (self.options.column,)

    def left_out(self, row: dict[str, Any]) -> str | None:
        """The first filter that the file does not pass."""
        self._refuse_halves(row)
        if self._languages and str(_first(row, _LANGUAGE)).lower() not in self._languages:
            return _no_column(row, _LANGUAGE) or "another language"
        if self._extensions and _extension(row) not in self._extensions:
            return _no_column(row, ("ext", *_PATH)) or "another extension"
        if self._licences and not self._allowed(_first(row, _LICENCES)):
            return _no_column(row, _LICENCES) or "another licence, or none"
        size = len(self._content(row).encode())
        if size < self.options.min_bytes:
            return "smaller than min_bytes"
        if self.options.max_bytes is not None and size > self.options.max_bytes:
            return "larger than max_bytes"
        return None

    def sample(self, row: dict[str, Any], shard: Path, kind: str) -> Sample:
        """The file as one text."""
        refuse_preferences(row, (self.options.column,))
        self._refuse_halves(row)
        text = self._content(row)
        if not text.strip():
            raise DataError("empty: there is nothing to learn", field=self.options.column)
        metadata, options = self._metadata(row), self.options
        if any(token in part for token in self._written for part in (text, *metadata.values())):
            return Sample(text=text, notes=(_HOLDS_TOKENS, *self.unread(row, kind)))
        text = fill_in_the_middle(text, self._fim, options.fim_rate, options.fim_spm_rate, self.config.order.seed)
        front = "".join(f"{self._tokens[name]}{value}" for name, value in metadata.items())
        return Sample(
            text=f"{front}\n{text}" if front else text, special_tokens=self._written, notes=self.unread(row, kind)
        )

    def unread(self, row: dict[str, Any], kind: str) -> tuple[str, ...]:
        """All that is neither the content, nor what code data usually says of it."""
        return unread(row, (self.options.column, *_USUAL))

    def _refuse_halves(self, row: dict[str, Any]) -> None:
        for name in self._read:
            refuse_half(row.get(name), name)

    def _content(self, row: dict[str, Any]) -> str:
        text = row.get(self.options.column)
        if not isinstance(text, str):
            shown = ", ".join(map(str, row)) or "none"
            raise DataError(
                f"a text is expected, not {type(text).__name__} (columns: {shown}): name the right one in "
                "data.options.column",
                field=self.options.column,
            )
        return text

    def _allowed(self, licences: Any) -> bool:
        names = [licences] if isinstance(licences, str) else licences
        if not isinstance(names, list) or not names:
            return False
        return all(isinstance(name, str) and name.lower() in self._licences for name in names)

    def _metadata(self, row: dict[str, Any]) -> dict[str, str]:
        """Name of the token -> what follows it, for what the row has."""
        if not self.options.repo_metadata:
            return {}
        found = {name: _first(row, columns) for name, columns in _METADATA.items()}
        if isinstance(found["stars"], int | float):
            found["stars"] = star_bucket(int(found["stars"]))
        return {name: str(value) for name, value in found.items() if value is not None}


Bucket = Literal["0", "1-10", "10-100", "100-1000", "1000+"]


def star_bucket(stars: int) -> Bucket:
    """StarCoder's classes of stars.

    >>> star_bucket(12)
    '10-100'
    """
    if stars <= 0:
        return "0"
    return "1-10" if stars <= 10 else "10-100" if stars <= 100 else "100-1000" if stars <= 1000 else "1000+"


def _first(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _no_column(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """The reason, if the data has none of the columns that a filter needs."""
    return None if any(name in row for name in names) else f"none of the columns {', '.join(names)}"


def _extension(row: dict[str, Any]) -> str:
    if isinstance(row.get("ext"), str):
        return str(row["ext"]).lower().lstrip(".")
    path = _first(row, _PATH)
    return PurePosixPath(path).suffix.lower().lstrip(".") if isinstance(path, str) else ""


class FimTokens(NamedTuple):
    """Special tokens of the model."""

    prefix: str
    middle: str
    suffix: str


def fill_in_the_middle(text: str, tokens: FimTokens, rate: float, spm_rate: float, seed: int) -> str:
    """The text, rearranged with probability `rate` so that a model learns to write what is missing in the middle.

        "abcdef" cut at 2 and 4:
        PSM    <fim_prefix>ab<fim_suffix>ef<fim_middle>cd
        SPM    <fim_prefix><fim_suffix>ef<fim_middle>abcd        with probability `spm_rate` of the rearranged ones

    Bavarian et al. 2022, "Efficient training of language models to fill in the middle", cut at characters, as in StarCoder's
    data; SPM is the paper's variant whose tokens are those of PSM with nothing between the first two. All choices are keyed
    hashes of the seed and the text: the same on every loader and in every epoch.
    """
    key = key64("fim", seed, text) if rate else 0
    if key64("fim rate", key) >= rate * _ONE:
        return text
    cuts = sorted(key64("fim cut", key, i) * (len(text) + 1) // _ONE for i in range(2))
    prefix, middle, suffix = text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]
    if key64("fim order", key) < spm_rate * _ONE:
        return f"{tokens.prefix}{tokens.suffix}{suffix}{tokens.middle}{prefix}{middle}"
    return f"{tokens.prefix}{prefix}{tokens.suffix}{suffix}{tokens.middle}{middle}"
