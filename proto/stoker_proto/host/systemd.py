"""What systemd wants to know of a service with `Type=notify`: that it is ready, stops, and is not stuck. See sd_notify(3).

notifier = Notifier(os.environ)        # says nothing where NOTIFY_SOCKET is not set
notifier.send("READY=1", "STATUS=serving")
notifier.send("WATCHDOG=1")            # at least every notifier.watchdog_s, or systemd restarts the service
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping

logger = logging.getLogger(__name__)

_SEND_DEADLINE_S = 1.0


class Notifier:
    """One datagram per message, to the Unix socket that systemd named."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        name = environment.get("NOTIFY_SOCKET", "")
        self._address = f"\0{name[1:]}" if name.startswith("@") else name  # @: a name without a file
        is_for_us = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        interval_us = int(environment.get("WATCHDOG_USEC", "0")) if self._address and is_for_us else 0
        self.watchdog_s: float | None = interval_us / 1e6 or None
        """After so long without WATCHDOG=1 systemd ends the service; None: it does not watch."""

    def send(self, *lines: str) -> bool:
        """Send assignments such as READY=1. Returns whether they arrived; True where nobody listens."""
        if not self._address:
            return True
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(_SEND_DEADLINE_S)
                sender.connect(self._address)
                sender.send("\n".join(lines).encode())
        except OSError as error:
            logger.warning("systemd was not told %s: %s", lines[0], error)
            return False
        return True
