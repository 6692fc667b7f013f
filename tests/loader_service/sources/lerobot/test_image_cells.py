"""Cells of an image column that name a file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loader_service.sources.lerobot import image_column
from loader_service.sources.lerobot.files import Files
from loader_service.sources.lerobot.image_column import ImagePlace, decode_image
from stoker_proto.errors import DataError


def test_a_pipe_and_a_file_above_the_cap_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = ImagePlace(str(tmp_path), str(tmp_path), Files(None))
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match=r"pipe.png cannot be read \(it is no regular file\)"):
        decode_image({"bytes": None, "path": "pipe.png"}, (8, 8), place)
    (tmp_path / "large.png").write_bytes(b"12345")
    monkeypatch.setattr(image_column, "MAX_FILE_BYTES", 4)
    with pytest.raises(DataError, match=r"large.png cannot be read \(it has 5 bytes, and at most 4 are read\)"):
        decode_image({"bytes": None, "path": "large.png"}, (8, 8), place)
