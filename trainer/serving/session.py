"""The rules of one connection, without a socket: a message in, replies out.

    openpi      {observation}  ->  {"actions": float32[k, D], "outside_mass": 0.002, "server_timing": {"infer_ms": 41.0}}
                error          ->  a text frame, then the connection closes (as openpi's own server does)
    vla-eval    hello          ->  nothing: the greeting was a hello already
                episode_start  ->  nothing; the next observation starts with a look
                observation    ->  "action" {"actions": float32[D]}: the next of the k first actions of a chunk
                error          ->  "error" {"error": text}; the connection stays

The greeting satisfies both: it is openpi's metadata, and in the form of vla-eval's hello.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stoker_proto.errors import RemoteProtocolError, StokerError
from trainer.policy_chunks import ChunkPlayer, ChunkPredictor, check_execute
from trainer.serving.observations import ObservationReader
from trainer.serving.wire import VLA_EVAL_VERSION, decode, encode, envelope, is_envelope


@dataclass(frozen=True, slots=True)
class Reply:
    """What the server sends. A text is openpi's form of an error."""

    frame: bytes | str
    closes: bool = False
    """Whether the connection ends with it."""


class Session:
    """One client. `greeting` first; then `answer` for each of its frames, one after the other."""

    def __init__(
        self, policy: ChunkPredictor, read: ObservationReader, metadata: Mapping[str, Any], execute: int | None
    ) -> None:
        """execute: actions of a chunk that the client gets; None: all. Raises ConfigError."""
        self._policy, self._read, self._metadata = policy, read, dict(metadata)
        self._execute = check_execute(execute, policy.chunk)
        self._player = ChunkPlayer(policy, self._execute)
        self._previous_s: float | None = None

    def greeting(self) -> bytes:
        """The first frame of the connection."""
        payload = {"protocol_version": VLA_EVAL_VERSION, "harness_version": "stoker", **self._metadata}
        return encode({**self._metadata, **envelope("hello", payload, 0)})

    def answer(self, frame: bytes | str) -> Reply | None:
        """The reply to a frame; None: it gets none. Raises what a defect of the server or of the model's code raises."""
        if isinstance(frame, str):
            return Reply("a text frame: send msgpack in binary frames", closes=True)
        try:
            message = decode(frame)
        except RemoteProtocolError as error:
            return Reply(str(error), closes=True)
        if not is_envelope(message):
            return self._answer_openpi(message)
        seq = message["seq"] if isinstance(message["seq"], int) else 0
        try:
            return self._answer_vla_eval(message, seq)
        except StokerError as error:
            payload = {"error": str(error)}
            return Reply(encode(envelope("error", payload, seq), vla_eval=True))

    def _answer_openpi(self, observation: Mapping[str, Any]) -> Reply:
        started = time.monotonic()
        try:
            [prediction] = self._policy.predict([self._read(observation)])
        except StokerError as error:
            return Reply(str(error), closes=True)
        timing = {"infer_ms": 1000 * (time.monotonic() - started)}
        if self._previous_s is not None:
            timing["prev_total_ms"] = 1000 * self._previous_s
        self._previous_s = time.monotonic() - started
        answer = {
            "actions": prediction.actions[: self._execute],
            "outside_mass": prediction.outside_mass,
            "server_timing": timing,
        }
        return Reply(encode(answer))

    def _answer_vla_eval(self, message: Mapping[str, Any], seq: int) -> Reply | None:
        """Raises StokerError."""
        kind, payload = message["type"], message["payload"]
        if kind in ("episode_start", "episode_end"):
            self._player.reset()
            return None
        if kind in ("hello", "error"):
            return None
        if kind != "observation" or not isinstance(payload, Mapping):
            raise RemoteProtocolError(
                f"a message of type {kind!r}: hello, episode_start, observation and episode_end are known"
            )
        action = self._player.next_action(self._read(payload))
        answer = {"actions": action, "outside_mass": self._player.outside_mass}
        return Reply(encode(envelope("action", answer, seq), vla_eval=True))
