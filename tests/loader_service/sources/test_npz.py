"""NPZ files: what is read, how little of it, and what is refused."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from loader_service.sources import npz as npz_module
from loader_service.sources.npz import NpzFile
from stoker_proto.errors import DataError

RGB = np.random.default_rng(3).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
DEPTH = np.arange(5 * 4 * 6, dtype=np.uint16).reshape(5, 4, 6)

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"


@pytest.fixture(params=["stored", "deflated"])
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"{request.param}.npz"
    (np.savez if request.param == "stored" else np.savez_compressed)(path, rgb=RGB, depth=DEPTH)
    return path


def write_member(path: Path, content: bytes, method: int = zipfile.ZIP_STORED, name: str = "rgb.npy") -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(name, content)
    return path


def npy(header: str, data: bytes = b"", magic: bytes = b"\x93NUMPY\x01\x00") -> bytes:
    text = header.encode() + b"\n"
    return magic + struct.pack("<H", len(text)) + text + data


def read_all(path: Path, name: str = "rgb") -> np.ndarray:
    with NpzFile(str(path)) as npz:
        frames = npz.frames(name, dtype=np.uint8, ndim=4)
        return np.stack([frames[i] for i in range(len(frames))])


def refusal(path: Path, name: str = "rgb") -> str:
    with pytest.raises(DataError) as caught:
        read_all(path, name)
    assert caught.value.file == str(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_frames_are_the_arrays(archive: Path) -> None:
    with NpzFile(str(archive)) as npz:
        assert npz.names == ["rgb", "depth"]
        frames = npz.frames("rgb", dtype=np.uint8, ndim=4)
        assert (frames.shape, frames.dtype, len(frames)) == ((5, 4, 6, 3), np.uint8, 5)
        for i in (4, 0, 2, 2):
            np.testing.assert_array_equal(frames[i], RGB[i])
        depth = npz.frames("depth", dtype=np.uint16, ndim=3)
        np.testing.assert_array_equal(depth[3], DEPTH[3])
        with pytest.raises(IndexError, match="frame 5 of 5"):
            frames[5]
        npz.verify("rgb")
        npz.verify("depth")


def test_only_the_frames_asked_for_are_read_of_a_stored_member(tmp_path: Path) -> None:
    path = tmp_path / "big.npz"
    rgb = np.zeros((64, 64, 64, 3), np.uint8)
    np.savez(path, rgb=rgb)
    frame_bytes = rgb[0].nbytes

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

    before = bytes_read()
    with NpzFile(str(path)) as npz:
        frames = npz.frames("rgb", dtype=np.uint8, ndim=4)
        frames[7]
        frames[50]
    assert bytes_read() - before < 2 * frame_bytes + 8192


def test_a_member_nobody_asks_for_is_never_touched(archive: Path) -> None:
    content = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as opened:
        start = opened.getinfo("depth.npy").header_offset
        end = opened.start_dir
    content[start:end] = b"\xff" * (end - start)
    archive.write_bytes(content)
    np.testing.assert_array_equal(read_all(archive), RGB)
    assert "depth: its local header contradicts the directory" in refusal(archive, "depth")


def test_a_comment_and_many_members_are_read(tmp_path: Path) -> None:
    path = tmp_path / "many.npz"
    np.savez(path, **{f"array_{i:03d}": np.zeros(1) for i in range(60)}, rgb=RGB)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"made by hand " * 200
    np.testing.assert_array_equal(read_all(path), RGB)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty (0 bytes): copy it again"),
        (b"<!DOCTYPE html><title>404</title>", "not an NPZ (a ZIP archive): it begins with b'<!DOCTYPE html>"),
        (b"PK\3\4" + b"\0" * 200, "its end is missing: the file was cut short at 204 bytes; copy it again"),
        (b"\x93NUMPY\x01\x00" + b"\0" * 99, r"it begins with b'\x93NUMPY"),
    ],
)
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "obs.npz"
    path.write_bytes(content)
    assert said in refusal(path)


def test_a_truncated_file_is_refused_wherever_it_ends(archive: Path) -> None:
    whole = archive.read_bytes()
    for length in range(1, len(whole), 37):
        archive.write_bytes(whole[:length])
        assert "cut short" in refusal(archive) or length < 16


def test_a_flipped_bit_in_deflated_data_is_found(tmp_path: Path) -> None:
    path = tmp_path / "obs.npz"
    np.savez_compressed(path, rgb=np.zeros((5, 64, 64, 3), np.uint8))
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as opened:
        end = opened.start_dir
    for position in (end - 5, end - 20, end - 40):
        content = bytearray(whole)
        content[position] ^= 0x10
        path.write_bytes(content)
        assert str(path) + ": field rgb: " in refusal(path)
        assert "copy it again" in refusal(path)


def test_a_flipped_bit_in_stored_data_is_found_when_all_of_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "obs.npz"
    np.savez(path, rgb=RGB)
    content = bytearray(path.read_bytes())
    content[content.index(RGB[2].tobytes()) + 5] ^= 1
    path.write_bytes(content)
    np.testing.assert_array_equal(read_all(path)[0], RGB[0])
    with NpzFile(str(path)) as npz, pytest.raises(DataError, match=r"field rgb: its CRC-32 is .* bits have flipped"):
        npz.verify("rgb")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"x" * 8),
            "pickled Python objects, which are never",
        ),
        (npy("{'descr': '|u1', 'fortran_order': True, 'shape': (1, 1, 1, 3), }", b"abc"), "Fortran order"),
        (
            npy("{'descr': '|u1', 'fortran_order': False, 'shape': (9999999, 256, 256, 3), }", b"abc"),
            "its header promises [9999999, 256, 256, 3] of uint8 = 1966079803392 bytes, and there are 3",
        ),
        (
            npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1, 1, 2), }", b"abc"),
            "= 2 bytes, and there are 3",
        ),
        (
            npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 1, 1), }", b"abcd"),
            "dtype float32: uint8 is expected",
        ),
        (
            npy("{'descr': '|u1', 'fortran_order': False, 'shape': (3,), }", b"abc"),
            "shape [3]: 4 dimensions are expected",
        ),
        (npy("{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (3,), }", b"abc"), "no plain array's"),
        (npy("{'descr': '|u1', 'shape': (3,), }", b"abc"), "no plain array's"),
        (npy("{'descr': '|u1', 'descr': '|u1', 'fortran_order': False, 'shape': (3,), }", b"abc"), "no plain array's"),
        (npy("{'descr': __import__('os'), 'fortran_order': False, 'shape': (3,), }", b"abc"), "no plain array's"),
        (npy("{'descr': '|u1', 'fortran_order': False, 'shape': (-1,), }", b"abc"), "no plain array's"),
        (npy("{'descr': '|V3', 'fortran_order': False, 'shape': (1,), }", b"abc"), "plain numbers are expected"),
        (npy(" " * 2000, b"abc"), "a .npy header of 2001 bytes"),
        (npy("{}", b"abc", magic=b"\x93NUMPY\x09\x00"), ".npy format version 9"),
        (b"\x80\x04pickle" * 10, "not a .npy array"),
        (b"", "not a .npy array"),
    ],
)
def test_a_member_that_is_no_plain_array_is_refused(tmp_path: Path, content: bytes, said: str, method: int) -> None:
    path = write_member(tmp_path / "obs.npz", content, method)
    message = refusal(path)
    assert message.startswith(f"{path}: field rgb: ")
    assert said in message


def test_other_spellings_of_a_header_are_read(tmp_path: Path) -> None:
    header = '{"shape":(5,4,6,3),"descr":"|u1","fortran_order":False}'
    for magic in (b"\x93NUMPY\x01\x00", b"\x93NUMPY\x02\x00", b"\x93NUMPY\x03\x00"):
        content = npy(header, RGB.tobytes(), magic)
        if magic[6] != 1:  # a length of four bytes
            content = magic + struct.pack("<I", len(header) + 1) + content[10:]
        np.testing.assert_array_equal(read_all(write_member(tmp_path / "obs.npz", content)), RGB)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_duplicate_member_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "obs.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("rgb.npy", b"one")
        archive.writestr("rgb.npy", b"two")
    assert "field rgb: two members of this name" in refusal(path)


def test_an_unknown_compression_is_refused(tmp_path: Path) -> None:
    path = write_member(tmp_path / "obs.npz", b"x" * 100, zipfile.ZIP_LZMA)
    assert "field rgb: ZIP method 14: only stored and deflated members are read" in refusal(path)


def patch_directory(path: Path, offset: int, value: bytes) -> None:
    """Change bytes of the first entry of the central directory."""
    content = bytearray(path.read_bytes())
    start = content.index(b"PK\1\2") + offset
    content[start : start + len(value)] = value
    path.write_bytes(content)


def test_an_encrypted_member_is_refused(archive: Path) -> None:
    patch_directory(archive, 8, struct.pack("<H", 1))
    assert "field rgb: it is encrypted" in refusal(archive)


def test_a_claimed_size_is_checked_before_memory_is_asked_for(archive: Path) -> None:
    patch_directory(archive, 24, struct.pack("<I", 3_000_000_000))
    assert "field rgb: it claims 3000000000 bytes, and" in refusal(archive)
    patch_directory(archive, 20, struct.pack("<II", 2_999_999_999, 3_000_000_000))
    assert "field rgb: " in refusal(archive)
    patch_directory(archive, 20, struct.pack("<II", 0xFFFFFFFF, 0xFFFFFFFF))
    assert "at most 4294967296 are read" in refusal(archive)


def test_a_member_over_the_cap_is_refused(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npz_module, "MAX_MEMBER_BYTES", RGB.nbytes)  # its header makes it larger
    assert f"an array of {RGB.nbytes + 128} bytes: at most {RGB.nbytes} are read; split the trajectory" in refusal(
        archive
    )


def test_a_size_that_the_data_does_not_give_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "obs.npz"
    np.savez_compressed(path, rgb=np.zeros((5, 4, 6, 3), np.uint8))
    size = 128 + 360
    patch_directory(path, 24, struct.pack("<I", size + 10))
    assert "its header promises [5, 4, 6, 3] of uint8 = 360 bytes, and there are 370" in refusal(path)
    patch_directory(path, 24, struct.pack("<I", size - 10))
    assert "and there are 350" in refusal(path)


@pytest.mark.parametrize(("there", "said"), [(360, "bytes and claims"), (380, "its compressed data is damaged")])
def test_data_that_is_not_what_header_and_directory_say(tmp_path: Path, there: int, said: str) -> None:
    header = npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1, 37, 10), }")
    path = write_member(tmp_path / "obs.npz", header + bytes(there), zipfile.ZIP_DEFLATED)
    patch_directory(path, 24, struct.pack("<I", len(header) + 370))
    assert said in refusal(path)


@pytest.mark.long
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("shape", [(1, 9000, 9000, 3), (1, 1, 40_000, 3), (2, 40_000, 1, 3)])
def test_absurd_frames_are_refused_before_they_are_inflated(
    tmp_path: Path, shape: tuple[int, ...], method: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}", bytes(int(np.prod(shape))))
    path = write_member(tmp_path / "obs.npz", content, method)
    monkeypatch.setattr(NpzFile, "_inflate", None)
    message = refusal(path)
    assert (
        f"field rgb: a frame of {shape[1]} x {shape[2]}: at most 32768 a side and 67108864 pixels are read" in message
    )


def test_a_missing_array_names_those_that_are_there(archive: Path) -> None:
    assert "field image: there is no such array; there are rgb, depth" in refusal(archive, "image")


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    assert "there is no such file" in refusal(tmp_path / "absent.npz")
    assert "not a file" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe.npz")  # opening it must not wait for a writer
    assert "not a file" in refusal(tmp_path / "pipe.npz")


def test_no_descriptor_is_left_open(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"PK\3\4 and no more")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(5):
        read_all(archive)
        refusal(tmp_path / "bad.npz")
        refusal(archive, "absent")
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_random_damage_gives_the_arrays_or_a_data_error(archive: Path) -> None:
    """Whatever byte is wrong: never another exception, and from deflated members never a wrong frame."""
    seed = 20240611
    random = np.random.default_rng(seed)
    whole = archive.read_bytes()
    refused = 0
    for trial in range(150):
        content = bytearray(whole)
        for _ in range(int(random.integers(1, 4))):
            content[int(random.integers(len(content)))] = int(random.integers(256))
        archive.write_bytes(content)
        try:
            found = read_all(archive)
        except DataError:
            refused += 1
            continue
        if archive.stem == "deflated":
            np.testing.assert_array_equal(found, RGB, err_msg=f"seed {seed}, trial {trial}")
    assert refused > 15


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_small_archive_with_the_records_of_zip64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Callable[..., None]
) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    save(tmp_path / "a.npz", rgb=RGB, depth=DEPTH)
    content = (tmp_path / "a.npz").read_bytes()
    assert b"PK\6\6" in content
    assert b"PK\6\7" in content
    np.testing.assert_array_equal(read_all(tmp_path / "a.npz"), RGB)
    with NpzFile(str(tmp_path / "a.npz")) as npz:
        np.testing.assert_array_equal(npz.frames("depth", dtype=np.uint16, ndim=3).whole(), DEPTH)
        npz.verify("rgb")
    (tmp_path / "a.npz").write_bytes(content.replace(b"PK\6\7", b"PK\6\0"))
    assert "its directory does not lie where it should" in refusal(tmp_path / "a.npz")


def test_a_git_lfs_pointer(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(POINTER)
    assert "a Git LFS pointer, not the file itself: run `git lfs pull`" in refusal(tmp_path / "a.npz")
