"""The limit of open files and connections, which programs of ours raise at their start."""

from __future__ import annotations

import logging
import resource

logger = logging.getLogger(__name__)

MOST = 1 << 20
"""More is never asked for: some hosts allow a thousand million, and libraries make tables of the limit's size."""


def raise_descriptor_limit() -> int:
    """Raise the soft limit of descriptors to the hard one, for this process and those it starts; returns the soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return MOST if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:
        logger.warning("the limit of descriptors stays at %d (%s)", soft, error)
        return soft
    return wanted
