"""`data.exclude`: samples keep their places and lose their labels, on every loader; names that are wrong are rejected."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from loader_service.replay.command import main
from stoker_proto.config.reader import load_config
from stoker_proto.errors import RefusedError
from tests.end_to_end.fleet import run_cli, serving, write_config, write_demonstrations
from tests.end_to_end.recorded import record_steps, write_chats
from tests.tiny_models import write_model_folder
from trainer.feed.feed import Feed
from trainer.report.loss_spikes import WARM_UP, WorstSteps

Rows = list[tuple[tuple[int, int, int], bytes, bytes]]
"""(key of its sample, token ids, which of them are labels) of each row."""


def pulled(config: Path, address: str, *overrides: str) -> tuple[Rows, dict[str, float]]:
    """An epoch's rows, and the loader's counters."""
    loaded = load_config(config, [f"cluster.loader_addresses=[{address}]", *overrides])
    rows: Rows = []
    with Feed(loaded, "train", 0, 1) as feed:
        feed.connect()
        for batch in feed.steps(0, 0):
            for micro in batch.micro_batches:
                first = 0
                for row in range(micro.num_rows):
                    length = int(micro.attention_mask[row].sum())
                    keys = micro.sample_keys[first : first + int(micro.row_samples[row])]
                    first += len(keys)
                    labels = (np.asarray(micro.labels[row, :length]) != -100).tobytes()
                    rows.append((tuple(keys.ravel().tolist()), micro.input_ids[row, :length].tobytes(), labels))
        [progress] = feed.progress(fresh_within_s=60).values()
    return rows, progress


def test_the_worst_rows_of_a_run_are_taken_out_as_stoker_batch_names_them(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demos = write_demonstrations(tmp_path / "demos", [5, 9, 1, 7, 12, 3, 8])
    config, run, file = write_config(tmp_path, model, [demos]), tmp_path / "run", tmp_path / "exclude.txt"
    with serving(config) as loader:
        record_steps(config, [loader.address], run, ranks=1, first_step=1, stop_step=4)
        before, _ = pulled(config, loader.address)
        record = json.loads((run / "digests-rank0.jsonl").read_text().splitlines()[0])["record"]
        worst = WorstSteps(run, 0, record, keep=2, done=0)
        for step in range(-WARM_UP, 1):
            worst.add(step, 1.0, [[1.0] * 4])
        worst.add(2, 4.0, [[2.0, 1.0, 2.5, 1.0], [1.0, 1.0, 1.0, 7.0]])
        assert main(["--run", str(run), "--worst-loss", "1", "--exclude-lines"]) == 0
        text = capsys.readouterr().out
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        assert len(lines) == 3
        assert all(line.startswith("data.train_data_paths[0] ") and line.endswith(" demos.jsonl") for line in lines)
        file.write_text(
            text + "\ndata.train_data_paths[0] 0 * demos/demos.jsonl\n"
        )  # all 5 samples of the first record

        excluding = f"data.exclude={file}"
        with (
            serving(config, "--set", excluding) as other,
            serving(config, "--set", excluding, "--set", "loader.workers=2") as third,
        ):
            file.write_text("nonsense, which nobody may read any more\n")
            after, counters = pulled(config, other.address)
            again, _ = pulled(config, third.address)
        assert after == again
        assert [row[:2] for row in after] == [row[:2] for row in before], "the same tokens at the same places"
        gone = [row[0] for row, old in zip(after, before, strict=True) if row[2] != old[2]]
        offsets = [0]
        for line in demos.read_text().splitlines():
            offsets.append(offsets[-1] + len(line) + 1)
        named = {(0, offsets.index(int(line.split()[1])), int(line.split()[2])) for line in lines}
        assert set(gone) == named | {(0, 0, timestep) for timestep in range(5)}
        assert all(not any(row[2]) for row in after if row[0] in gone)
        assert counters["excluded"] == len(gone)
        assert counters["skipped"] == 0

        # A fleet that does not agree is no fleet: `other` has the file, and `loader` has not.
        file.write_text(text)
        with serving(config, "--set", excluding) as other:
            one, two = (load_config(config, [f"cluster.loader_addresses=[{at.address}]"]) for at in (loader, other))
            with Feed(one, "train", 0, 1) as feed:
                pins = feed.connect().fingerprints
            with (
                Feed(two, "train", 0, 1, pins=pins) as feed,
                pytest.raises(RefusedError, match=r"plan: the loader has \w+, this rank \w+;"),
            ):
                feed.connect()


def test_packed_rows_lose_the_labels_of_one_text_alone(tmp_path: Path) -> None:
    model = write_model_folder(tmp_path / "model", "causal")
    chats = write_chats(tmp_path / "chats.jsonl", 12)
    config = write_config(tmp_path, model, [chats], dataset_type="chat", max_seq_len=128, packing=True)
    with serving(config) as loader:
        before, _ = pulled(config, loader.address)
    record = next(row[0][1] for row in before if len(row[0]) > 3)  # of a row of several texts
    offset = len("".join(chats.read_text().splitlines(keepends=True)[:record]))
    (tmp_path / "exclude.txt").write_text(f"data.train_data_paths[0] {offset} 0 chats.jsonl\n")
    with serving(config, "--set", f"data.exclude={tmp_path / 'exclude.txt'}") as loader:
        after, counters = pulled(config, loader.address)
    [(old, new)] = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert old[:2] == new[:2]
    assert record in old[0][1::3]
    assert 0 < sum(new[2]) < sum(old[2])
    assert counters["excluded"] == 1


FORM = "ENTRY OFFSET SAMPLE FILE is expected, e.g. data.train_data_paths[0] 5310 7 a.jsonl"
WAY_OUT = "correct the line, or delete it"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[0] 0", f"'data.train_data_paths[0] 0': {FORM}"),
        ("[3] 0 0 a.jsonl", "there is no entry data.train_data_paths[3]: the config has data.train_data_paths[0]"),
        ("[0] 0 0 emos.jsonl", f"no file of the entry DEMOS is called emos.jsonl: was it renamed?; {WAY_OUT}"),
        ("[0] 7 0 demos.jsonl", f"no record of demos.jsonl begins at offset 7; {WAY_OUT}"),
        ("[0] 0 5 demos.jsonl", f"the record has 5 samples, counted from 0, not 5; {WAY_OUT}"),
    ],
)
def test_a_wrong_line_is_named_before_anything_is_served(
    line: str, said: str, config: Path, demos: Path, tmp_path: Path
) -> None:
    file = tmp_path / "exclude.txt"
    file.write_text(f"# a comment\n\n  data.train_data_paths[0] 0 4 demos.jsonl\ndata.train_data_paths{line}\n")
    done = run_cli("serve", "--config", str(config), "--set", f"data.exclude={file}")
    assert done.returncode == 1
    assert done.stderr == f"loader-serve: data.exclude: {file}, line 4: {said.replace('DEMOS', str(demos))}\n"
