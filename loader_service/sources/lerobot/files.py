"""The files of a data set, local or behind a URL; remote ones are fetched when they are opened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stoker_proto.errors import DataError

if TYPE_CHECKING:
    from loader_service.remote.store import RemoteStore


class Files:
    """The files of data sets that lie here, and of those behind URLs."""

    def __init__(self, store: RemoteStore | None) -> None:
        self.store = store

    def is_remote(self, path: Path) -> bool:
        """Whether the path is that of a copy, which may not be here."""
        return self.store is not None and self.store.holds(path)

    def local(self, path: Path) -> Path:
        """The same path, with the file there. Raises DataError, FetchError (`BaseSFTDataset.local`)."""
        return path if self.store is None else Path(self.store.local(str(path)))

    def is_there(self, path: Path) -> bool:
        """Whether the file exists. A remote one is fetched for that."""
        if not self.is_remote(path):
            return path.is_file()
        try:
            self.local(path)
        except DataError:
            return False
        return True
