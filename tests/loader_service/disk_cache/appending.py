"""A process that keeps records until it is killed: `python appending.py FOLDER LIMIT FIRST STEP`.

It keeps records FIRST, FIRST + STEP, ... and prints the number of each one that is kept.
"""

import hashlib
import sys
import time
from pathlib import Path

from loader_service.disk_cache.store import DiskCache


def key_of(number: int) -> bytes:
    """16 bytes."""
    return hashlib.blake2b(b"key %d" % number, digest_size=16).digest()


def record_of(number: int) -> bytes:
    """Bytes that only this record has, of 1 to 40 KiB."""
    return hashlib.sha256(b"%d" % number).digest() * (32 + number * 37 % 1200)


def main() -> None:
    """Until it is killed."""
    folder, limit, number, step = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    cache = DiskCache(folder, limit)
    while True:
        before = cache.counters.written_bytes
        cache.put(key_of(number), record_of(number))
        if cache.counters.written_bytes > before:
            print(number, flush=True)
        else:  # the others had the lock for two seconds, or all the room: nothing is kept for a while
            time.sleep(0.01)
        number += step


if __name__ == "__main__":
    main()
