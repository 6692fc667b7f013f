"""What one loader serves: the config, the data that it holds, and what it tells ranks about both."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from loader_service.manifest import EntryManifest
from loader_service.pieces.excluded import Excluded
from loader_service.remote.shared_store import remote_store
from stoker_proto.config import Config
from stoker_proto.config.reader import config_to_tree
from stoker_proto.processor import Processor


def new_name() -> str:
    """A random name for one incarnation of a loader."""
    return uuid.uuid4().hex[:12]


@dataclass(frozen=True)
class Served:
    """Fixed for the life of a loader."""

    config: Config
    entries: Mapping[str, Mapping[int, EntryManifest]]
    """Split -> number of the entry in the config -> its manifest."""
    fingerprints: Mapping[str, str]
    """What a rank compares with its own (PROTOCOL.md, *Fingerprints*)."""
    processor_json: str
    """`Processor.to_json`: a rank builds its own from it."""
    tokens: Mapping[str, Mapping[int, int]]
    """Split -> entry -> tokens of all its samples."""
    name: str = field(default_factory=new_name)

    def write_job(
        self, run_dir: Path, processor: Processor, excluded: Excluded, num_workers: int, num_threads: int
    ) -> None:
        """Write into the run directory all that a worker needs to know."""
        manifests = [
            {
                "folder": str(manifest.folder),
                **asdict(manifest.named),
                "held": None if manifest.held is None else sorted(manifest.held),
            }
            for entries in self.entries.values()
            for manifest in entries.values()
        ]
        store = remote_store(self.config.data)
        job = {
            "config": config_to_tree(self.config),
            "manifests": manifests,
            "remote": {} if store is None else store.shards,  # versions that these manifests were made of
            "loader": self.name,
            "exclude": excluded.to_json(),  # not read again: a worker that is restarted must have the same
            "workers": num_workers,
            "threads": num_threads,
        }
        (run_dir / "job.json").write_text(json.dumps(job))
        processor.save(run_dir)
