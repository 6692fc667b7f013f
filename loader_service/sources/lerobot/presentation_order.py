"""The number of a decoded frame in its mp4, in the order of showing, without decoding what comes before it.

The file's index says how many packets lie before a keyframe. All of these are shown before it. The packets that were read since
are counted by their time stamps:

    index    K0 P P P K4 P P P        read from K4 on: pts 4, 6, 5, 7
    frame    with pts 6: 4 packets before K4, and pts 4 and 5 before it: number 6

Counting by time from the file's beginning would be wrong. Where episodes were encoded separately and joined, each join may shift
the time stamps by a part of a frame.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Any


class ShownOrder:
    """Of one stream. `restart` after a seek, `read` each packet, then `number_of` the frames that come out."""

    def __init__(self, stream: Any) -> None:
        self._index = stream.index_entries
        self._num_hidden = _num_hidden(self._index)
        is_whole = (
            0 < stream.frames == len(self._index)
        )  # not in files of fragments: their index grows as they are read
        self.num_frames: int | None = len(self._index) - self._num_hidden if is_whole else None
        """Frames that the file shows; None where its index does not say."""
        self.restart()

    def restart(self) -> None:
        """The next packet is a keyframe."""
        self._base: int | None = None
        self._shown: list[int] = []  # pts, rising
        self._is_first = True

    def read(self, packet: Any) -> None:
        """Count a packet. Packets come in the order of the file."""
        if self._is_first and self.num_frames is not None and packet.is_keyframe and packet.dts is not None:
            place: int = self._index.search_timestamp(packet.dts, any_frame=True)
            self._base = max(place - self._num_hidden, 0) if place >= 0 else None
        self._is_first = False
        if packet.pts is not None and not packet.is_discard:
            insort(self._shown, packet.pts)

    def number_of(self, pts: int) -> int | None:
        """Of the frame with this time stamp, from 0 on; None where the index does not say."""
        return None if self._base is None else self._base + bisect_left(self._shown, pts)

    def ticks_of(self, number: int) -> int:
        """When about the frame is decoded. A seek to it leads to a keyframe near it."""
        ticks: int = self._index[min(max(number, 0) + self._num_hidden, len(self._index) - 1)].timestamp
        return ticks


def _num_hidden(index: Any) -> int:
    """Packets at the beginning that an edit list hides."""
    for number, entry in enumerate(index):
        if not entry.is_discard:
            return number
    return 0
