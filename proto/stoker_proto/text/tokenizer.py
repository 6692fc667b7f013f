"""A model's tokenizer without transformers: `tokenizer.json` through `tokenizers`, and the names of its special tokens.

Rules: the special tokens before a text (begin-of-sequence) are those that tokenizer.json's own post-processor puts there, if any.
Those that it puts after a text are left out. `<|User|>` and the like are special tokens where the tokenizer has them, and plain
text where it does not. Nothing is added to the vocabulary, except the action tokens of `data.action.vocabulary: added`.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from stoker_proto.actions.vocabulary import ActionVocabulary, action_tokens
from stoker_proto.errors import ConfigError, DataError, StokerError
from stoker_proto.hashing import fingerprint
from stoker_proto.host.files import read_regular
from stoker_proto.model_folder import MAX_TOKENIZER_BYTES, ModelFolder, refuse_pointer
from stoker_proto.text.control_tokens import is_action_token
from stoker_proto.text.token_bytes import TokenBytes

Ids = NDArray[np.int32]
"""int32[T]."""

_MOST_PARTS = 4  # largest number of bytes, and so of tokens, of a character
_PROBES = (
    "Pick up the red cube and place it on the plate.",
    "  In: What action\tshould the robot take?\nOut: \n\n",
    "x = [1234567, -0.5e-3]  # 50% of $20; (see) <|User|><image></s><|im_end|> e-mail@example.org",
    "Der Würfel fällt — «déjà vu», 机器人把方块推到目标。 ロボット Привет مرحبا 🤖",
    "ne\u0301e nu\u0308 \u212b \u2126 \u1100\u1161",  # characters that NFC composes ...
    "caf\u00e9 \u0439 \ud55c",  # ... and NFD decomposes
    "\ufb01n x\u00b2 \u00bd \u2460 \uff21\uff22\uff43\uff11 \uff76\uff9e \u2026 \u2122",  # NFKC and NFKD
    "a\u00a0b\u2003c\u3000d\u200be\u00adf\ufeffg\r\nh\u0085i \u0000\u0007",  # white space, invisible and control characters
    "STRASSE Straße ẞ İstanbul ΣΊΣΥΦΟΣ",  # case and accents
    "\u201cquoted\u201d \u2018it\u2019s\u2019 ``so'' ٣ ३ Ⅷ",  # quotes and digits
)
"""Encoded for the fingerprint, to cover what the vocabulary does not show: how a tokenizer normalises and where it cuts."""


def int32_array(ids: Sequence[int]) -> Ids:
    """int32[T], read-only, from Python integers, in a quarter of the time of `np.array`."""
    return np.frombuffer(struct.pack(f"{len(ids)}i", *ids), np.int32)


class TextTokenizer:
    """Text <-> token ids for one model."""

    def __init__(self, tokenizer: Tokenizer, names: dict[str, str]) -> None:
        """names: e.g. {"eos_token": "</s>"}. This object takes over the tokenizer and changes it."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer, self.names = tokenizer, names
        with _panics(ConfigError, "the model's tokenizer fails on the text 'a'"):
            plain, full = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
        self.leading: list[int] = full[: next((i for i, token in enumerate(full) if [token] == plain[:1]), 0)]
        """Ids before every text, e.g. [bos]."""
        self._fingerprint: str | None = None
        self._bytes: TokenBytes | None = None
        self._added: frozenset[int] | None = None

    @classmethod
    def from_folder(cls, folder: ModelFolder) -> Self:
        """The tokenizer of a model's folder. Raises ConfigError."""
        names = folder.special_tokens()
        tokenizer = load_tokenizer(folder.tokenizer_file)
        text_config = folder.config.get("text_config") or {}
        for kind in ("bos", "eos", "pad"):  # config.json may name what the tokenizer does not
            number = folder.config.get(f"{kind}_token_id", text_config.get(f"{kind}_token_id"))
            number = number[0] if isinstance(number, list) and number else number
            token = tokenizer.id_to_token(number) if isinstance(number, int) and number >= 0 else None
            if f"{kind}_token" not in names and token is not None:
                names[f"{kind}_token"] = token
        return cls(tokenizer, names)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without leading tokens. Special tokens in it are recognised."""
        with _panics(DataError, "the model's tokenizer fails on this text"):
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        """int32[T] of each text, as `encode`. Uses several cores where TOKENIZERS_PARALLELISM allows it."""
        pipeline: Any = self.tokenizer
        try:  # no context: it is called for every record
            encoded = pipeline.encode_batch_fast(texts, add_special_tokens=False)
        except BaseException as error:
            _raise_panic(error, DataError, "the model's tokenizer fails on a text")
            raise
        return [int32_array(found.ids) for found in encoded]

    def encoding(self, text: str) -> Encoding:
        """As `encode`, together with the characters that each token stands for."""
        with _panics(DataError, "the model's tokenizer fails on this text"):
            found: Encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return found

    @property
    def token_bytes(self) -> TokenBytes:
        """The bytes that each token stands for in texts encoded by `encode_batch`."""
        if self._bytes is None:
            self._bytes = TokenBytes(self.tokenizer)
        return self._bytes

    def encode_without_added(self, text: str) -> list[int]:
        """The ids of a text in which added tokens, including special ones, are read as plain text."""
        pipeline: Any = self.tokenizer
        if pipeline.normalizer is not None:
            text = pipeline.normalizer.normalize_str(text)
        splits = (
            [text] if pipeline.pre_tokenizer is None else [s for s, _ in pipeline.pre_tokenizer.pre_tokenize_str(text)]
        )
        return [token.id for split in splits for token in pipeline.model.tokenize(split)]

    @property
    def added_ids(self) -> frozenset[int]:
        """The ids of all added tokens."""
        if self._added is None:
            self._added = frozenset(self.tokenizer.get_added_tokens_decoder())
        return self._added

    def control_tokens(self) -> list[str]:
        """The special tokens, which text from data must not be able to write."""
        added = self.tokenizer.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special]

    def plain_added_tokens(self) -> list[str]:
        """The added tokens that are not special."""
        added = self.tokenizer.get_added_tokens_decoder().values()
        return [token.content for token in added if not token.special]

    def texts_of(self, ids: Sequence[int]) -> list[str]:
        """The text of each token, special ones by name. A character of several tokens is the text of the last one; the others
        have "". A token that completes no character is shown as the vocabulary writes it."""
        texts: list[str] = []
        parts: list[int] = []
        for number in ids:
            parts.append(number)
            text: str = self.tokenizer.decode(parts, skip_special_tokens=False)
            if text and "\ufffd" not in text:
                texts += [""] * (len(parts) - 1) + [text]
                parts = []
            elif not text or len(parts) == _MOST_PARTS:
                texts += map(self._name_of, parts)
                parts = []
        return texts + list(map(self._name_of, parts))

    def _name_of(self, number: int) -> str:
        text: str = self.tokenizer.decode([number], skip_special_tokens=False)
        return text if text and "\ufffd" not in text else self.tokenizer.id_to_token(number) or f"<id {number}>"

    def id_of(self, token: str) -> int | None:
        """The id of a token; None where there is no such token."""
        number: int | None = self.tokenizer.token_to_id(token)
        return number

    def named_id(self, name: str) -> int | None:
        """The id of a token by its role, e.g. "eos_token"; None where there is none."""
        token = self.names.get(name)
        return None if token is None else self.id_of(token)

    @property
    def size(self) -> int:
        """The largest id + 1."""
        added = self.tokenizer.get_added_tokens_decoder()
        return max([self.tokenizer.get_vocab_size(with_added_tokens=True), *(number + 1 for number in added)])

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the vocabulary, the merges and the ids of some texts. It is the same for every version of `tokenizers`,
        and for a file that was saved again with or without our action tokens."""
        if self._fingerprint is None:
            self._fingerprint = self._make_fingerprint()
        return self._fingerprint

    def _make_fingerprint(self) -> str:
        numbers = self.tokenizer.get_vocab(with_added_tokens=True)
        tokens = [token for token in sorted(sorted(numbers), key=numbers.__getitem__) if not is_action_token(token)]
        merges = json.loads(self.tokenizer.to_str())["model"].get("merges") or []
        digest = hashlib.sha256("\n".join(tokens).encode("utf-8", "surrogatepass"))
        digest.update(np.array([numbers[token] for token in tokens], "<i8").tobytes())
        digest.update("\n".join([merge if isinstance(merge, str) else " ".join(merge) for merge in merges]).encode())
        with _panics(ConfigError, "the model's tokenizer fails on a short text"):
            probes = [self.tokenizer.encode(text, add_special_tokens=False).ids for text in _PROBES]
        return fingerprint([digest.hexdigest(), self.leading, probes])

    def add_actions(self, mode: str, num_codes: int) -> ActionVocabulary:
        """Choose the ids of action codes; the mode `added` adds tokens that are not there yet. Raises ConfigError."""
        if mode == "added":
            tokens = action_tokens(num_codes)
            self.tokenizer.add_tokens(tokens)
            self._bytes = self._added = None
            first = self.id_of(tokens[0]) or 0
            if [self.id_of(token) for token in tokens] != list(range(first, first + num_codes)):
                raise ConfigError(
                    f"data.action.vocabulary is added: the tokenizer has some of {tokens[0]} ... {tokens[-1]} already, but "
                    "not all in order; take the tokenizer of the model before it was trained on other actions"
                )
            return ActionVocabulary.added(first_id=first, num_codes=num_codes)
        size = self.tokenizer.get_vocab_size(with_added_tokens=False)
        special = self.tokenizer.get_added_tokens_decoder()
        overrun = [special[number].content for number in range(max(size - num_codes, 0), size) if number in special]
        if overrun or num_codes >= size:
            reason = f"special tokens among them ({', '.join(overrun[:5])})" if overrun else "no others"
            raise ConfigError(
                f"data.action.vocabulary is reuse_last: the last {num_codes} of the tokenizer's {size} tokens would be actions, "
                f"but there are {reason}; use data.action.vocabulary=added"
            )
        return ActionVocabulary.reuse_last(vocab_size=size, num_codes=num_codes)

    def save(self, file: Path) -> None:
        """Write tokenizer.json, including action tokens."""
        file.write_text(self.tokenizer.to_str(pretty=True), encoding="utf-8")


@contextmanager
def _panics(kind: type[StokerError], what: str) -> Iterator[None]:
    """A panic of the Rust library becomes an error of this kind. Its regexes give up so after 10 million steps back, in 1 to 2 s.

    A panic is no `Exception`, and would end the thread."""
    try:
        yield
    except BaseException as error:
        _raise_panic(error, kind, what)
        raise


def _raise_panic(error: BaseException, kind: type[StokerError], what: str) -> None:
    """Raises an error of this kind if `error` is a panic."""
    if type(error).__name__ == "PanicException":
        raise kind(f"{what} ({error}): use another tokenizer.json, or shorten the text") from error


def load_tokenizer(file: Path) -> Tokenizer:
    """The `tokenizers` object of a tokenizer.json. Raises ConfigError."""
    loading: Any = Tokenizer
    try:
        content = read_regular(file, MAX_TOKENIZER_BYTES)
        refuse_pointer(file, content)
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: the tokenizer cannot be read ({error}); check model.base_model_path") from error
    try:
        tokenizer: Tokenizer = loading.from_str(text)
    except Exception as error:  # the Rust library raises no narrower type
        raise ConfigError(f"{file}: not a tokenizer ({error}); copy the model folder again") from error
    return tokenizer
