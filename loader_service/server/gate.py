"""Who may connect: CURVE on the loader's ROUTER, and the list of admitted keys.

libzmq asks for each handshake on an in-process socket (ZAP, ZeroMQ RFC 27); the front's own loop answers, so no thread and no
lock is needed. A peer without a listed key never gets as far as a message; it is counted and, not too often, logged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import zmq
from zmq.utils import z85

from loader_service.server.refusals import Refusals
from stoker_proto.errors import ConfigError
from stoker_proto.wire.keys import Key

logger = logging.getLogger(__name__)

_ZAP_ADDRESS = "inproc://zeromq.zap.01"  # fixed by RFC 27
_DOMAIN = b"stoker"
_AT_ONCE = 256
_REASONS: dict[int, str] = {
    zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC: "it was made for another loader's public key (cluster.security.loader_key)",
    zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH: "it brought no key (cluster.security.rank_secret)",
}
"""libzmq's code for a handshake that failed before ZAP was asked -> text for the log."""


HANDSHAKE_EVENTS = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
"""Events that the socket's monitor must report (`loader_service.server.connections`)."""


class Gate:
    """Admits ranks by their public key. Make it before the socket is bound; close it before the socket."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        router: zmq.Socket[bytes],
        secret: Key,
        allowed: Mapping[bytes, str],
    ) -> None:
        """allowed: public key (Z85) -> name. Raises ConfigError where this ZeroMQ has no CURVE."""
        if not zmq.has("curve"):
            raise ConfigError(
                "cluster.security is set, but this pyzmq was built without CURVE: install its wheel from PyPI"
            )
        self._allowed = dict(allowed)
        self._refusals = Refusals()
        self.hung_up = 0
        """Connections that the other side closed in mid-handshake: port checks, and ranks that saw first that keys differ."""
        self.zap = context.socket(zmq.REP)
        self.zap.setsockopt(zmq.LINGER, 0)
        self.zap.bind(_ZAP_ADDRESS)
        for option, value in (
            (zmq.CURVE_SECRETKEY, secret.value),
            (zmq.CURVE_PUBLICKEY, zmq.curve_public(secret.value)),
            (zmq.CURVE_SERVER, 1),
            (zmq.ZAP_DOMAIN, _DOMAIN),
            (zmq.ZAP_ENFORCE_DOMAIN, 1),  # without it, peers would be admitted if nothing answered
        ):
            router.setsockopt(option, value)

    @property
    def refused(self) -> int:
        """Handshakes refused: unknown key, no key, a key for another loader, or none of the protocol."""
        return self._refusals.total

    def look(self) -> None:
        """Answer waiting handshakes, some hundred at most. Never blocks."""
        for _ in range(_AT_ONCE):
            try:
                request = self.zap.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            self.zap.send_multipart(self._answer(request), zmq.NOBLOCK)

    def failed(self, event: int, value: int) -> None:
        """Count one of `HANDSHAKE_EVENTS`: a handshake that failed before ZAP was asked."""
        if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            self.hung_up += 1
            logger.info(
                "a peer hung up in the handshake (%d so far): a port check, or a rank without our keys", self.hung_up
            )
        else:
            self._refuse("a peer", _REASONS.get(value, "it does not speak the protocol"))

    def close(self) -> None:
        """Close; from then on nobody is admitted."""
        self.zap.close(0)

    def _answer(self, request: list[bytes]) -> list[bytes]:
        """Version, number, domain, address, identity, mechanism, key -> version, number, status, text, user, metadata."""
        number, address = request[1], request[3]
        where = address.decode("ascii", "replace")
        if len(request) != 7 or request[5] != b"CURVE":
            self._refuse(where, "it brought no CURVE key")
            return [b"1.0", number, b"400", b"CURVE is required", b"", b""]
        key = z85.encode(request[6])
        name = self._allowed.get(key)
        if name is None:
            self._refuse(where, "is not in cluster.security.allowed_ranks", f"its public key {key.decode()} ")
            return [b"1.0", number, b"400", b"unknown key", b"", b""]
        logger.info("admitted rank key %s from %s", name, where)
        return [b"1.0", number, b"200", b"OK", name.encode(), b""]

    def _refuse(self, who: str, why: str, subject: str = "") -> None:
        """Count a refusal, and log it if it is one of the first. subject: what of the text is the peer's own."""
        if self._refusals.add(why):
            logger.warning("refused connection %d, from %s: %s%s", self.refused, who, subject, why)
