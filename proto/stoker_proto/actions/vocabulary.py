"""The token ids of action codes.

reuse_last   the last ids of the vocabulary, backwards (as OpenVLA): of 32000 tokens, code 0 -> 31999, code 255 -> 31744
added        new tokens "<action_0>" ... behind the vocabulary: from id 32064, code 0 -> 32064, code 255 -> 32319
"""

from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt

from stoker_proto.errors import ConfigError, DataError

Mode = Literal["reuse_last", "added"]
Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionVocabulary:
    """The bijection between action codes in [0, num_codes) and token ids."""

    mode: Mode
    num_codes: int
    anchor_id: int
    """`reuse_last`: the size of the vocabulary, one past the id of code 0. `added`: the id of code 0."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ConfigError(f"action tokens mode {self.mode!r}; it is one of {', '.join(get_args(Mode))}")
        if self.num_codes < 1:
            raise ConfigError(f"{self.num_codes} action codes; there must be at least 1")
        if self.mode == "reuse_last" and self.num_codes > self.anchor_id:
            raise ConfigError(
                f"{self.num_codes} action codes do not fit into a vocabulary of {self.anchor_id} tokens; "
                "use added tokens or a smaller codebook"
            )
        if self.first_id < 0:
            raise ConfigError(f"action tokens from id {self.first_id} on; ids start at 0")

    @classmethod
    def reuse_last(cls, *, vocab_size: int, num_codes: int) -> Self:
        """The last `num_codes` ids of `vocab_size` tokens (not counting rows that only pad the embedding)."""
        return cls(mode="reuse_last", num_codes=num_codes, anchor_id=vocab_size)

    @classmethod
    def added(cls, *, first_id: int, num_codes: int) -> Self:
        """`num_codes` new tokens from `first_id` on."""
        return cls(mode="added", num_codes=num_codes, anchor_id=first_id)

    @property
    def first_id(self) -> int:
        """The smallest id of an action token."""
        return self.anchor_id - self.num_codes if self.mode == "reuse_last" else self.anchor_id

    @property
    def end_id(self) -> int:
        """One past the largest id of an action token."""
        return self.first_id + self.num_codes

    def to_ids(self, codes: npt.ArrayLike) -> Int32Array:
        """Codes int32[...] -> ids int32[...]. Raises DataError for a code outside [0, num_codes)."""
        array = np.asarray(codes, dtype=np.int64)
        outside = (array < 0) | (array >= self.num_codes)
        if outside.any():
            raise DataError(f"action code {array[outside].flat[0]} is outside [0, {self.num_codes})")
        return self._swap(array)

    def to_codes(self, ids: npt.ArrayLike) -> Int32Array:
        """Ids int32[...] -> codes int32[...]. Raises DataError for an id that is no action token."""
        array = np.asarray(ids, dtype=np.int64)
        inside = self.is_action(array)
        if not inside.all():
            wrong = array[~inside].flat[0]
            raise DataError(f"token id {wrong} is no action token; those are [{self.first_id}, {self.end_id})")
        return self._swap(array) if self.mode == "reuse_last" else (array - self.anchor_id).astype(np.int32)

    def is_action(self, ids: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Ids [...] -> bool[...]: which are action tokens."""
        array = np.asarray(ids)
        result: npt.NDArray[np.bool_] = (array >= self.first_id) & (array < self.end_id)
        return result

    def to_json(self) -> dict[str, Any]:
        """Mode, number of codes, anchor."""
        return {"mode": self.mode, "num_codes": self.num_codes, "anchor_id": self.anchor_id}

    @classmethod
    def from_json(cls, d: dict[str, Any]) -> Self:
        """The vocabulary that `to_json` described."""
        try:
            return cls(mode=d["mode"], num_codes=int(d["num_codes"]), anchor_id=int(d["anchor_id"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"an action vocabulary needs mode, num_codes and anchor_id; found {d!r}") from error

    def _swap(self, array: npt.NDArray[np.int64]) -> Int32Array:
        """code -> id; with `reuse_last` also id -> code."""
        swapped = self.anchor_id - 1 - array if self.mode == "reuse_last" else self.anchor_id + array
        return swapped.astype(np.int32)


def action_tokens(num_codes: int) -> list[str]:
    """The new tokens of the mode `added`, in the order of their ids: "<action_0>" ..."""
    return [f"<action_{code}>" for code in range(num_codes)]
