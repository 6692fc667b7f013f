"""Arrays of an NPZ file (a ZIP of .npy members). Reads only what is asked for, and checks every claim of the file.

    with NpzFile(path) as npz:
        frames = npz.frames("rgb", dtype=np.uint8, ndim=4)      # [T, H, W, 3]
        frames.shape, frames[3]                                 # one frame, uint8[H, W, 3]

A *stored* member is read by offset: one `pread` per frame asked for. A *deflated* one is inflated whole by libdeflate when
`frames` asks for it, and its CRC-32 is compared. Other members are not read. The CRC of a stored member covers all of it, so
reading single frames cannot compare it: `NpzFile.verify` does (`loader-prepare --verify`).

Every size in the file is compared with what the file can hold before memory is allocated. Nothing is unpickled.
"""

from __future__ import annotations

import math
import os
import stat
import zipfile
import zlib
from types import TracebackType
from typing import Any, Self

import deflate
import numpy as np
from numpy.typing import DTypeLike, NDArray

from loader_service.sources.named_files import NamedFiles, content_of
from loader_service.sources.npy_header import MAX_HEADER_BYTES, parse_npy_header
from loader_service.sources.zip_directory import Member, data_offset, read_directory
from stoker_proto.errors import DataError, located
from stoker_proto.host.stages import INFLATE, switch
from stoker_proto.host.trouble import check_host

MAX_MEMBER_BYTES = 4 << 30
"""Largest array that is read into memory, however small its file."""
MAX_FRAME_PIXELS = 1 << 26
"""Of one frame: 8192 x 8192."""
MAX_SIDE = 1 << 15
"""Longest height or width."""
_MAX_DEFLATE_RATIO = 1032  # RFC 1951: a match of 258 bytes takes at least 2 bits
_BLOCK = 1 << 20


class _RunningCrc:
    """CRC-32 of an inflated member, taken as far as its frames were given out: a frame is in the cache then, the whole is not."""

    def __init__(self, content: bytearray, member: Member, name: str) -> None:
        self.member, self.name, self.value = member, name, 0
        self._content, self._done = memoryview(content), 0

    def reach(self, end: int) -> None:
        """Include the bytes up to `end`."""
        if end > self._done:
            self.value = deflate.crc32(self._content[self._done : end], self.value)
            self._done = end


class Frames:
    """An array [T, ...] of an NPZ, one frame at a time. Valid while its NpzFile is open (inflated ones: for ever)."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        *,
        file: NpzFile,
        offset: int,
        inflated: NDArray[Any] | None,
        crc: _RunningCrc | None = None,
    ) -> None:
        """offset: of the first frame in the member that is inflated, or in the file. inflated: the whole array, for a deflated
        member; crc: of that, where it is not checked yet."""
        self.shape, self.dtype = shape, dtype
        self._file, self._offset, self._inflated, self._crc = file, offset, inflated, crc
        self._frame_shape, self._is_native = shape[1:], dtype.isnative
        self._frame_bytes = math.prod(self._frame_shape) * dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> NDArray[Any]:
        """Frame `index`, [...], in the byte order of this host: a new array if the member is stored, else it may be a view of
        the inflated member."""
        if not 0 <= index < self.shape[0]:
            raise IndexError(f"frame {index} of {len(self)}")
        if self._inflated is not None:
            frame: NDArray[Any] = self._inflated[index]
            if self._crc is not None:
                self._crc.reach(self._offset + (index + 1) * self._frame_bytes)
        else:
            frame = np.empty(self._frame_shape, self.dtype)
            self._file.read_into(frame, self._offset + index * self._frame_bytes)
        return frame if self._is_native else frame.astype(frame.dtype.newbyteorder("="))

    def whole(self) -> NDArray[Any]:
        """All frames at once, [T, ...]: for arrays that are small."""
        if self._inflated is not None:
            return self._inflated
        array = np.empty(self.shape, self.dtype)
        self._file.read_into(array, self._offset)
        return array


class NpzFile:
    """An open NPZ; a context manager. Raises DataError that names the file, and the member as its field."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._unchecked: list[_RunningCrc] = []
        try:
            # O_NONBLOCK: a pipe in the place of a file must not hold the loader up; it changes nothing for files.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise DataError(
                "there is no such file: copy it there, or correct the row that names it", file=path
            ) from None
        except OSError as error:
            check_host(error, path)
            raise DataError(f"it cannot be opened ({error.strerror})", file=path) from error
        try:
            status = os.fstat(self._descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise self._error("not a file: an NPZ is expected")
            self._size, self._changed_ns = status.st_size, status.st_mtime_ns
            with located(file=path):
                self._members = read_directory(self._read, self._size)
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @property
    def names(self) -> list[str]:
        """The arrays in the file."""
        return list(self._members)

    @property
    def size_bytes(self) -> int:
        """Of the file, when it was opened."""
        return self._size

    @property
    def named_files(self) -> NamedFiles:
        """Fingerprint of the directory: name, size and CRC-32 of each member. How members are compressed does not enter."""
        members = sorted(
            (m.name, m.size.to_bytes(8, "little"), m.crc.to_bytes(4, "little")) for m in self._members.values()
        )
        return NamedFiles(content_of(part for member in members for part in member), self._changed_ns)

    def frames(
        self, name: str, *, dtype: DTypeLike | None, ndim: int, drop_channel: bool = False, check_later: bool = False
    ) -> Frames:
        """The array `name`, to be read frame by frame; it must have this dtype, this number of dimensions and C order.

        dtype: None: any kind of plain numbers.
        drop_channel: a further last dimension of size 1 is left out.
        check_later: `check_rest` checks the CRC of a deflated array, which costs less once its frames were read in order.
        """
        member = self._member(name)
        if member.method == zipfile.ZIP_STORED:
            start = self._data_offset(member, name)
            head = self._read(start, min(member.size, MAX_HEADER_BYTES), name)
        else:
            start = 0
            head = self._inflate_head(member, name)
        found, shape, header_bytes = self._parse_header(head, member, name)
        if dtype is not None and found.newbyteorder("=") != np.dtype(dtype):
            raise self._error(f"dtype {found}: {np.dtype(dtype)} is expected", name)
        if drop_channel and len(shape) == ndim + 1 and shape[-1] == 1:
            shape = shape[:-1]
        if len(shape) != ndim:
            raise self._error(f"shape {list(shape)}: {ndim} dimensions are expected", name)
        inflated = crc = None
        if member.method == zipfile.ZIP_DEFLATED:
            content = self._inflate(member, name)
            inflated = np.frombuffer(content, found, offset=header_bytes).reshape(shape)
            crc = _RunningCrc(content, member, name)
            self._unchecked.append(crc)
            if not check_later:
                self.check_rest()
                crc = None
        return Frames(shape, found, file=self, offset=start + header_bytes, inflated=inflated, crc=crc)

    def check_rest(self) -> None:
        """Check the CRC of the arrays whose check was put off. Raises DataError; until then their frames may be wrong."""
        unchecked, self._unchecked = self._unchecked, []
        for crc in unchecked:
            crc.reach(crc.member.size)
            self._check_crc(crc.value, crc.member, crc.name)

    def verify(self, name: str) -> None:
        """Read the whole member and compare its CRC-32."""
        member = self._member(name)
        if member.method == zipfile.ZIP_DEFLATED:
            self._check_crc(deflate.crc32(self._inflate(member, name)), member, name)
            return
        offset, crc = self._data_offset(member, name), 0
        for start in range(0, member.size, _BLOCK):
            crc = deflate.crc32(self._read(offset + start, min(_BLOCK, member.size - start), name), crc)
        self._check_crc(crc, member, name)

    def read_into(self, target: NDArray[Any], offset: int) -> None:
        """Fill a C-contiguous array with the file's bytes from `offset` on."""
        done = 0
        rest: Any = target
        while done < target.nbytes:
            try:
                count = os.preadv(self._descriptor, [rest], offset + done)
            except OSError as error:
                check_host(error, self.path)
                raise self._error(f"bytes at {offset + done} cannot be read ({error.strerror})") from error
            if count == 0:
                raise self._error("it ends too early: it was cut short while it was read; copy it again")
            done += count
            if done < target.nbytes:  # preadv reads at most 2 GiB at once
                rest = target.reshape(-1).view(np.uint8)[done:]

    def _error(self, reason: str, member: str = "") -> DataError:
        return DataError(reason, file=self.path, field=member)

    def _read(self, offset: int, size: int, name: str = "") -> bytes:
        try:
            data = os.pread(self._descriptor, size, offset)
            while len(data) < size:  # pread gives at most 2 GiB at once
                more = os.pread(self._descriptor, size - len(data), offset + len(data))
                if not more:
                    raise self._error("it ends too early: the file is cut short; copy it again", name)
                data += more
        except OSError as error:
            check_host(error, self.path)
            raise self._error(f"bytes at {offset} cannot be read ({error.strerror})", name) from error
        return data

    def _member(self, name: str) -> Member:
        member = self._members.get(name)
        if member is None:
            raise self._error(f"there is no such array; there are {', '.join(self._members) or 'none'}", name)
        if member.is_twice:
            raise self._error("two members of this name: which one is meant cannot be known", name)
        if member.flags & 0x2041:
            raise self._error("it is encrypted: write it without a password", name)
        if member.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self._error(f"ZIP method {member.method}: only stored and deflated members are read", name)
        if member.size > MAX_MEMBER_BYTES or 0xFFFFFFFF in (member.size, member.compressed_size, member.header_offset):
            raise self._error(
                f"an array of {member.size} bytes: at most {MAX_MEMBER_BYTES} are read; split the trajectory", name
            )
        stored = member.method == zipfile.ZIP_STORED
        most = member.compressed_size * (1 if stored else _MAX_DEFLATE_RATIO)
        if member.size > most or (stored and member.size != member.compressed_size):
            raise self._error(f"it claims {member.size} bytes, and {member.compressed_size} cannot hold them", name)
        return member

    def _data_offset(self, member: Member, name: str) -> int:
        with located(file=self.path, field=name):
            return data_offset(self._read, self._size, member)

    def _inflate_head(self, member: Member, name: str) -> bytes:
        """The beginning of a deflated member: what it claims is looked at before all of it is inflated."""
        compressed = self._read(
            self._data_offset(member, name), min(member.compressed_size, 2 * MAX_HEADER_BYTES), name
        )
        try:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(compressed, MAX_HEADER_BYTES)
        except zlib.error as error:
            raise self._error("its compressed data is damaged; copy it again", name) from error

    def _inflate(self, member: Member, name: str) -> bytearray:
        compressed = self._read(self._data_offset(member, name), member.compressed_size, name)
        before = switch(INFLATE)
        try:
            content: bytearray = deflate.deflate_decompress(compressed, member.size)
        except deflate.DeflateError as error:
            raise self._error("its compressed data is damaged; copy it again", name) from error
        if len(content) != member.size:
            raise self._error(
                f"it holds {len(content)} bytes and claims {member.size}: it is damaged; copy it again", name
            )
        switch(before)
        return content

    def _check_crc(self, crc: int, member: Member, name: str) -> None:
        if crc != member.crc:
            raise self._error(f"its CRC-32 is {crc:08x}, not {member.crc:08x}: bits have flipped; copy it again", name)

    def _parse_header(self, head: bytes, member: Member, name: str) -> tuple[np.dtype[Any], tuple[int, ...], int]:
        try:
            header = parse_npy_header(head)
        except DataError as error:
            raise self._error(error.reason, name) from error
        if max(header.shape[1:3], default=0) > MAX_SIDE or math.prod(header.shape[1:3]) > MAX_FRAME_PIXELS:
            size = " x ".join(map(str, header.shape[1:3]))
            raise self._error(
                f"a frame of {size}: at most {MAX_SIDE} a side and {MAX_FRAME_PIXELS} pixels are read", name
            )
        needed = math.prod(header.shape) * header.dtype.itemsize
        if header.size_bytes + needed != member.size:
            raise self._error(
                f"its header promises {list(header.shape)} of {header.dtype} = {needed} bytes, and there are "
                f"{member.size - header.size_bytes}: the file is damaged",
                name,
            )
        return header.dtype, header.shape, header.size_bytes
