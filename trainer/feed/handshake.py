"""Translates ZeroMQ's events of one connection: connected, lost, or denied because the two sides' keys do not match. No I/O.

CONNECTED .. HANDSHAKE_SUCCEEDED      connected
CONNECTED .. HANDSHAKE_FAILED_AUTH    denied: our key is not on the loader's list
CONNECTED .. HANDSHAKE_FAILED_PROTOCOL, mechanism mismatch    denied: one side uses keys, the other none
CONNECTED .. HANDSHAKE_FAILED_NO_DETAIL    hung up: what a loader does whose public key is not our loader_key,
                                           but also one that is just ending, or a tunnel without a loader behind it
"""

from __future__ import annotations

from dataclasses import dataclass

import zmq

_REASONS: dict[int, str] = {
    zmq.EVENT_CONNECTED: "something listens there, but has not spoken ZeroMQ: is it a loader's port?",
    zmq.EVENT_DISCONNECTED: "the connection broke",
    zmq.EVENT_CLOSED: "nothing listens there",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "what listens there hung up on the ZeroMQ handshake: is it a loader's port, "
    "and does that loader use keys (cluster.security)?",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "what listens there does not speak ZeroMQ: is it a loader's port?",
}
EVENTS = sum(_REASONS) | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
"""Events that the monitor reports."""
GIVEN_UP = (zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
"""After these ZeroMQ does not try again by itself."""
_HUNG_UP_OFTEN = 3


@dataclass(frozen=True, slots=True)
class Connected:
    """A new connection."""


@dataclass(frozen=True, slots=True)
class Lost:
    """There is no connection."""

    reason: str


@dataclass(frozen=True, slots=True)
class Denied:
    """There is no connection, and will be none with these keys; ZeroMQ does not try again by itself."""

    text: str
    news: bool
    """Whether this text is new for this loader."""


class Handshake:
    """The state of the connection to one loader."""

    def __init__(self, address: str, key_name: str | None) -> None:
        """key_name: name of this rank's key; None: it has none."""
        self._address, self._key_name = address, key_name
        self._is_connected = False
        self._hung_up = 0  # times in a row
        self._denied = ""

    def event(self, event: int, value: int) -> Connected | Lost | Denied | None:
        """What a monitor's event means; None if it adds nothing new."""
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._is_connected, self._hung_up, self._denied = True, 0, ""
            return Connected()
        was_is_connected, self._is_connected = self._is_connected, False
        mismatch = event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
        if mismatch or event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            text = self._mismatch() if mismatch else self._refused()
            news, self._denied = text != self._denied, text
            return Denied(text, news)
        if event == zmq.EVENT_DISCONNECTED and not was_is_connected:
            return None  # the event of the failed handshake gave the reason
        if event == zmq.EVENT_CONNECTED and (self._denied or self._hung_up):
            return None  # the next try: keep the known reason until it ends
        if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            self._hung_up += 1
            if self._key_name is not None and self._hung_up >= _HUNG_UP_OFTEN:
                return Lost(
                    "it hangs up on our encrypted handshake: cluster.security.loader_key is not the public key of the loader "
                    "there, that loader uses no keys, or no loader is behind that port"
                )
        elif event == zmq.EVENT_CLOSED:
            self._hung_up, self._denied = 0, ""
        return Lost(_REASONS[event])

    def _refused(self) -> str:
        return (
            f"the loader at {self._address} refused our key {self._key_name!r} (cluster.security.rank_secret): put its public "
            "half among that loader's cluster.security.allowed_ranks and restart the loader"
        )

    def _mismatch(self) -> str:
        if self._key_name is None:
            return (
                f"the loader at {self._address} refused us: it uses CURVE keys and this rank has none; set cluster.security."
                "loader_key and rank_secret"
            )
        return (
            f"the loader at {self._address} does not use CURVE, and this rank has a key: set cluster.security.loader_secret and "
            "allowed_ranks there, or take loader_key and rank_secret away here"
        )
