"""Byte-pair encoding (Gage 1994) of rows of small whole numbers: which pairs become one token is learned on a sample.

Loaders that fit on their own must agree to the bit, but the trainer of `tokenizers` does not document its result and may change
it in any version. So the merges are learned here by a rule without ties: the most frequent pair of neighbours is merged; of
equally frequent pairs, the one with the smaller (left, right); in a run such as `a a a`, the first two. Encoding by given merges
has only one correct result, and `tokenizers` finds it fast.

    row 0 0 0 1 0 0, merges (0, 0) -> 2, (2, 0) -> 3      tokens 3 1 2      token 3 expands to 0 0 0

Letters: N rows, L symbols of a row, S distinct symbols, V tokens.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.models import BPE

from stoker_proto.errors import DataError

IntArray = npt.NDArray[np.int64]
Merge = tuple[int, int]

_FIRST_CHARACTER = 0x10000  # symbol 0; from here on there are no surrogates in the way


def learn_merges(rows: npt.NDArray[np.integer], num_symbols: int, vocab_size: int, min_frequency: int) -> list[Merge]:
    """Merges in the order of their rank, from rows int[N, L] of symbols in [0, S).

    Stops at `vocab_size` tokens, or when no pair occurs `min_frequency` times. Merges whose tokens expand to the same symbols
    share one token, so there may be more merges than vocab_size - S.
    """
    base = vocab_size + 1
    flat: IntArray = np.pad(rows.astype(np.int64), ((0, 0), (0, 1)), constant_values=vocab_size).ravel()  # V: an end
    counts = np.zeros(base * base, dtype=np.int32)
    _count(counts, flat, np.arange(len(flat) - 1), base, 1)
    expansions: list[tuple[int, ...]] = [(symbol,) for symbol in range(num_symbols)]
    known = {expansion: token for token, expansion in enumerate(expansions)}
    merges: list[Merge] = []
    while len(expansions) < vocab_size:
        best = int(counts.argmax())
        if counts[best] < min_frequency:
            break
        left, right = divmod(best, base)
        expansion = expansions[left] + expansions[right]
        token = known.setdefault(expansion, len(expansions))
        if token == len(expansions):
            expansions.append(expansion)
        merges.append((left, right))
        flat = _merge(flat, left, right, token, counts, base)
    return merges


def expand(num_symbols: int, merges: Sequence[Merge]) -> list[tuple[int, ...]]:
    """The symbols that each token stands for. The first S tokens are the symbols. Raises DataError for damaged merges."""
    expansions: list[tuple[int, ...]] = [(symbol,) for symbol in range(num_symbols)]
    known = set(expansions)
    for left, right in merges:
        if not (0 <= left < len(expansions) and 0 <= right < len(expansions)):
            raise DataError(f"a damaged action codec: a merge of tokens {left} and {right}; run loader-prepare again")
        expansion = expansions[left] + expansions[right]
        if expansion not in known:
            known.add(expansion)
            expansions.append(expansion)
    return expansions


class PairEncoder:
    """Rows of symbols -> tokens, by given merges. Safe to use from many threads."""

    def __init__(self, num_symbols: int, merges: Sequence[Merge]) -> None:
        self.expansions = expand(num_symbols, merges)
        texts = [_text(expansion) for expansion in self.expansions]
        vocabulary = {text: token for token, text in enumerate(texts)}
        self._tokenizer = Tokenizer(BPE(vocabulary, [(texts[left], texts[right]) for left, right in merges]))

    def encode(self, row: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
        """int32[tokens] of one row int[L]."""
        return np.array(self._tokenizer.encode(_text(row.tolist())).ids, dtype=np.int32)

    def decode(self, tokens: Sequence[int]) -> list[int]:
        """The symbols of tokens in [0, V)."""
        return [symbol for token in tokens for symbol in self.expansions[token]]


def _text(symbols: Sequence[int]) -> str:
    return "".join([chr(_FIRST_CHARACTER + symbol) for symbol in symbols])


def _merge(flat: IntArray, left: int, right: int, token: int, counts: npt.NDArray[np.int32], base: int) -> IntArray:
    """`flat` with `token` in place of every (left, right). Updates the pair counts in `counts`."""
    at = np.flatnonzero((flat[:-1] == left) & (flat[1:] == right))
    if left == right:  # in a run of equal symbols every second pair
        starts = np.flatnonzero(np.diff(at, prepend=-2) > 1)
        within = np.arange(len(at)) - np.repeat(starts, np.diff(starts, append=len(at)))
        at = at[within % 2 == 0]
    _count(counts, flat, np.concatenate([at - 1, at, at + 1]), base, -1)
    flat[at] = token
    flat = np.delete(flat, at + 1)
    now = at - np.arange(len(at))
    _count(counts, flat, np.concatenate([now - 1, now]), base, 1)
    return flat


def _count(counts: npt.NDArray[np.int32], flat: IntArray, at: IntArray, base: int, change: int) -> None:
    """Add `change` for the pairs that begin at these positions, each once. A row's end is not part of a pair."""
    at = np.unique(at)
    at = at[(at >= 0) & (at < len(flat) - 1)]
    left, right = flat[at], flat[at + 1]
    inside = (left != base - 1) & (right != base - 1)
    np.add.at(counts, left[inside] * base + right[inside], change)
