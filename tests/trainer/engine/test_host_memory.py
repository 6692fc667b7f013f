"""The memory that is left: the host's, or that of the tightest control group."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from trainer.engine.host_memory import available_bytes

GB = 10**9


@pytest.mark.parametrize(
    ("pod", "container", "expected"),
    [
        (("max", 9 * GB, 0), ("max", 2 * GB, 0), 30 * GB),
        (("max", 9 * GB, 0), (str(8 * GB), 5 * GB, 2 * GB), 5 * GB),
        ((str(10 * GB), 9 * GB, 0), (str(8 * GB), 5 * GB, 2 * GB), 1 * GB),
        ((str(10 * GB), 11 * GB, 0), ("max", 5 * GB, 0), 0),
        ((str(64 * GB), 9 * GB, 0), ("max", 5 * GB, 0), 30 * GB),
    ],
)
def test_the_tightest_group_decides(
    pod: tuple[str, int, int],
    container: tuple[str, int, int],
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each group: limit, used bytes, and those of them that are files which give way. The host has 30 GB."""
    folder = tmp_path / "pod" / "container"
    folder.mkdir(parents=True)
    for place, (limit, used, cached) in ((folder.parent, pod), (folder, container)):
        (place / "memory.max").write_text(f"{limit}\n")
        (place / "memory.current").write_text(f"{used}\n")
        (place / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\nactive_file 7\n")
    own = tmp_path / "own"
    own.write_text("1:name=systemd:/elsewhere\n0::/pod/container\n")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("memory", (), {"available": 30 * GB}))
    assert available_bytes(tmp_path, own) == expected
    assert available_bytes(tmp_path, tmp_path / "absent") == 30 * GB
