"""G9, G10: every kind of bad record in one data set. Each is named with file, record and field, the same from every loader."""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stoker_proto.errors import DataError
from tests.end_to_end.faults.crew import rss_bytes
from tests.end_to_end.fleet import pull, run_program, serving, write_config, write_demonstrations

T = 4
MIB = 1 << 20
GOOD = 6  # records before the bad ones


def member(path: Path, content: bytes, method: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("rgb.npy", content)


def npy(shape: tuple[int, ...], data: bytes = b"", descr: str = "|u1") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def truncated(npz: Path) -> None:
    npz.write_bytes(npz.read_bytes()[:-40])


def bomb(npz: Path) -> None:
    """300 MB of zeros in 300 KB, as a frame of 10,000 x 10,000."""
    member(npz, npy((1, 10_000, 10_000, 3), bytes(300_000_000)))


def huge_frames(npz: Path) -> None:
    """Absurd dimensions whose size is true: a whole frame of 9,000 x 12,000."""
    member(npz, npy((1, 9_000, 12_000, 3), bytes(9_000 * 12_000 * 3)))


def thin_frames(npz: Path) -> None:
    np.savez_compressed(npz, rgb=np.zeros((T, 1, 100_000, 3), np.uint8))


def no_pixels(npz: Path) -> None:
    np.savez_compressed(npz, rgb=np.zeros((T, 0, 64, 3), np.uint8))


def lying_header(npz: Path) -> None:
    member(npz, npy((T, 100_000, 100_000, 3), bytes(300)))


def duplicate_member(npz: Path) -> None:
    content = io.BytesIO()
    np.save(content, np.zeros((T, 8, 8, 3), np.uint8))
    with zipfile.ZipFile(npz, "w") as archive:
        archive.writestr("rgb.npy", content.getvalue())
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("rgb.npy", content.getvalue())


def object_array(npz: Path) -> None:
    np.savez(npz, rgb=np.array([{"a": 1}], dtype=object), allow_pickle=True)  # type: ignore[arg-type]


def floats(npz: Path) -> None:
    np.savez(npz, rgb=np.full((T, 8, 8, 3), np.nan, np.float32))


def web_page(npz: Path) -> None:
    npz.write_bytes(b"<html>404 not found</html>" * 9)


def missing(npz: Path) -> None:
    npz.unlink()


def symlink_out(npz: Path) -> None:
    outside = npz.parents[2] / "outside.npz"
    np.savez(outside, rgb=np.zeros((T, 8, 8, 3), np.uint8))
    npz.unlink()
    npz.symlink_to(outside)


FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncated, "cut short"),
    "bomb": (bomb, "field rgb: a frame of"),
    "huge frames": (huge_frames, "field rgb: a frame of"),
    "thin frames": (thin_frames, "field rgb: a frame of"),
    "no pixels": (no_pixels, "field rgb: shape [4, 0, 64, 3]"),
    "lying header": (lying_header, "field rgb: a frame of"),
    "duplicate member": (duplicate_member, "field rgb: two members of this name"),
    "object array": (object_array, "field rgb: it holds pickled Python objects, which are never loaded"),
    "floats": (floats, "field rgb: dtype float32: uint8 is expected"),
    "web page": (web_page, "not an NPZ"),
    "missing": (missing, "there is no such file"),
    "symlink": (symlink_out, "field obs_path: 'traj_17/obs.npz' leads outside"),
}
ROWS: dict[str, tuple[dict[str, object], str]] = {
    "parent": ({"obs_path": "../outside.npz"}, "field obs_path: '../outside.npz' leads outside"),
    "absolute": ({"obs_path": "/etc/passwd"}, "field obs_path: '/etc/passwd' leads outside"),
    "zero byte": ({"obs_path": "a\0b"}, "field obs_path: 'a\\x00b' is not the path of a file"),
    "no number": ({"actions": [[None] * 7] * T}, "field actions"),
    "infinite": ({"actions": [[1e300 * 10] * 7] * T}, "field actions"),
    "ragged": ({"actions": [[0.5] * 7] * (T - 1) + [[0.5] * 6]}, "field actions"),
    "unknown task": ({"task": "NoSuchTask-v9"}, "NoSuchTask-v9"),
}


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good records, then one of each kind of bad ones, in the order of FILES and ROWS."""
    jsonl = write_demonstrations(tmp_path_factory.mktemp("spoiled") / "demos", [T] * (GOOD + len(FILES) + len(ROWS)))
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    for number, (spoil, _) in enumerate(FILES.values(), start=GOOD):
        spoil(jsonl.parent / f"traj_{number}" / "obs.npz")
    for number, (change, _) in enumerate(ROWS.values(), start=GOOD + len(FILES)):
        rows[number].update(change)
    jsonl.write_text("".join(json.dumps(row).replace("Infinity", "1e999") + "\n" for row in rows))
    return jsonl


def test_each_is_skipped_with_its_name_by_every_loader(tmp_path: Path, model: Path, spoiled: Path) -> None:
    config = write_config(tmp_path, model, [spoiled], on_bad_sample="skip")
    with serving(config) as first, serving(config, "--set", "loader.workers=2") as second:
        before = rss_bytes(first.process.pid)
        one, other = pull(config, [first.address]), pull(config, [second.address])
        assert rss_bytes(first.process.pid) - before < 300 * MIB
        for loader in (first, second):
            assert loader.process.poll() is None
        again = pull(config, [first.address])
    assert len(one.keys) == len(set(one.keys)) == T * (GOOD + len(FILES) + len(ROWS))
    assert sorted(one.skipped) == sorted(other.skipped) == sorted(again.skipped)
    assert one.steps == other.steps
    expected = {**FILES, **ROWS}
    assert len(one.skipped) == T * len(expected)
    for number, (kind, (_, text)) in enumerate(expected.items(), start=GOOD):
        lines = {line for line in one.skipped if re.search(rf"demos\.jsonl:{number + 1}\b", line)}
        (line,) = lines
        assert text in line, kind
        assert "\n" not in line
        assert len(line) < 600


def test_the_bench_lists_what_was_skipped(tmp_path: Path, model: Path, spoiled: Path) -> None:
    config = write_config(tmp_path, model, [spoiled], on_bad_sample="skip")
    with serving(config) as loader:
        done = run_program("trainer.bench.command", "--config", str(config), "--connect", loader.address, "--json")
    assert done.returncode == 0, done.stderr
    num_bad = len(FILES) + len(ROWS)
    assert f"skipped          {T * num_bad} bad samples:\n" in done.stdout
    assert f"4 samples: {spoiled.parent}/traj_{GOOD}/obs.npz, record {spoiled}:{GOOD + 1}" in done.stdout.replace(
        ": record", ", record"
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["skipped"] == T * num_bad
    assert len(figures["skipped_records"]) == num_bad
    assert set(figures["skipped_records"].values()) == {T}


@pytest.mark.parametrize("kind", ["bomb", "symlink"])
def test_policy_fail_ends_the_run_with_the_name(kind: str, tmp_path: Path, model: Path) -> None:
    jsonl = write_demonstrations(tmp_path / "demos", [T] * 20)
    spoil, text = FILES[kind]
    spoil(jsonl.parent / "traj_17" / "obs.npz")
    config = write_config(tmp_path, model, [jsonl])
    with serving(config) as loader:
        said = []
        for _ in range(2):
            with pytest.raises(DataError) as caught:
                pull(config, [loader.address])
            said.append(str(caught.value))
        assert loader.process.poll() is None
    assert said[0] == said[1]
    assert text in said[0]
    assert "demos.jsonl:18" in said[0]
