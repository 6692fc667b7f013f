"""`stoker-batch` makes the rows of any step of a run again, without its loaders and caches, and names what differs."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from loader_service.replay.command import main
from stoker_proto.errors import ConfigError, DataError
from stoker_proto.run_record import read_worst
from stoker_proto.wire import digests
from tests.end_to_end.fleet import run_cli, serving, write_config, write_demonstrations
from tests.end_to_end.recorded import change_pixel, record_steps, write_chats
from tests.tiny_models import write_model_folder
from trainer.feed import batch
from trainer.report.loss_spikes import WARM_UP, WorstSteps

LENGTHS = [5, 9, 1, 7, 12, 3, 8]  # 45 timesteps: six steps of 8 rows an epoch, the last of 5


@pytest.fixture(scope="module")
def robots(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """Demonstrations, and a run over them: steps 1 to 5 by two ranks; then from step 4 on by one rank, into the second epoch."""
    folder = tmp_path_factory.mktemp("robots")
    config = write_config(folder, model, [write_demonstrations(folder / "demos", LENGTHS)])
    with serving(config) as loader:
        address = [loader.address]
        record_steps(config, address, folder / "run", ranks=2, first_step=1, stop_step=6)
        micro = "trainer.micro_batch_size=2"
        record_steps(config, address, folder / "run", micro, ranks=1, first_step=4, stop_step=9)
    shutil.rmtree(folder / "cache")
    return folder


def rows(capsys: pytest.CaptureFixture[str], run: Path, step: int, *more: str) -> list[dict[str, Any]]:
    """What the command shows of a step."""
    assert main(["--run", str(run), "--step", str(step), "--json", *more]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_any_step_also_after_a_resume_at_another_world_size(robots: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = robots / "run"
    places = [(row["rank"], row["micro_batch"]) for row in rows(capsys, run, 2)]
    assert places == [(0, 0)] * 4 + [(1, 0)] * 4
    assert [row["rank"] for row in rows(capsys, run, 2, "--rank", "1")] == [1] * 4
    assert [row["micro_batch"] for row in rows(capsys, run, 5)] == [0, 0, 1, 1, 2, 2, 3, 3]  # by one rank, in twos
    assert len(rows(capsys, run, 6)) == 5  # the end of the epoch
    assert len(rows(capsys, run, 8)) == 8  # of the second epoch
    assert all(row["trained"] for row in rows(capsys, run, 8))
    with pytest.raises(ConfigError, match=r"--rank 1: the step was trained by 1 ranks"):
        main(["--run", str(run), "--step", "5", "--rank", "1"])
    with pytest.raises(ConfigError, match=r"step 9: .*digests-rank0.jsonl has steps up to 8"):
        main(["--run", str(run), "--step", "9"])
    assert main(["--run", str(run), "--step", "2", "--num", "1"]) == 0
    text = capsys.readouterr().out
    assert text.count("action of the tokens") == 1
    assert text.endswith("step 2: 8 rows of 2 ranks are those that were trained; epoch 0, first sample 8, loss 1.5\n")


def test_a_run_whose_digests_were_made_by_the_former_rule(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its record names no rule: images of any size went into SHA-256 as they are."""
    monkeypatch.setattr(digests, "_LARGE_BYTES", 1)
    monkeypatch.setattr(batch, "digests_of_rows", partial(digests.digests_of_rows, rule=1))
    config = write_config(tmp_path, model, [write_demonstrations(tmp_path / "demos", LENGTHS[:2])])
    with serving(config) as loader:
        record_steps(config, [loader.address], tmp_path / "run", ranks=1, first_step=1, stop_step=2)
    (record,) = (tmp_path / "run" / "record").glob("*.json")
    tree = json.loads(record.read_text())
    assert tree["digest_rule"] == 2
    with pytest.raises(DataError):
        main(["--run", str(tmp_path / "run"), "--step", "1"])
    capsys.readouterr()
    del tree["digest_rule"]
    record.write_text(json.dumps(tree))
    assert len(rows(capsys, tmp_path / "run", 1)) == 8
    record.write_text(json.dumps({**tree, "digest_rule": 3}))
    with pytest.raises(DataError, match=r"digest_rule 3: this program knows 1 to 2"):
        main(["--run", str(tmp_path / "run"), "--step", "1"])


@pytest.mark.slow
def test_the_rows_as_a_page(robots: Path, tmp_path: Path) -> None:
    page = tmp_path / "rows.html"
    assert main(["--run", str(robots / "run"), "--step", "2", "--html", str(page)]) == 0
    assert page.read_text().count("<section><h2>rank ") == 8
    assert "rank 1, micro-batch 0, row 3: train 0: pass 0, lane " in page.read_text()


@pytest.mark.slow
def test_the_samples_of_a_loss_spike(robots: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The loss rose at steps 1 to 3, most at step 2, where rank 1 has the worst row."""
    run = shutil.copytree(robots / "run", tmp_path / "run")
    with pytest.raises(ConfigError, match=r"worst-rank0.json names no step: the loss never rose"):
        main(["--run", str(run), "--worst-loss", "1"])
    record = json.loads((run / "digests-rank0.jsonl").read_text().splitlines()[0])["record"]
    for rank in range(2):
        worst = WorstSteps(run, rank, record, keep=2, done=0)
        for step in range(-WARM_UP, 1):
            worst.add(step, 1.0, [[1.0] * 4])
        worst.add(1, 1.5, [[1.0] * 4])
        worst.add(2, 4.0, [[2.0, 1.0, 2.5, 1.0] if rank == 0 else [1.0, 1.0, 1.0, 7.0]])
        worst.add(3, 2.0, [[1.0] * 4])
        worst.add(4, 0.5, [[1.0] * 4])
    assert [step.step for step in read_worst(run, 0)] == [2, 3]
    assert WorstSteps(run, 0, record, keep=2, done=2)._steps == read_worst(run, 0)[:1]  # step 3 is trained again
    assert main(["--run", str(run), "--worst-loss", "1", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["step"], row["loss"], row["rank"], row["row"]) for row in found] == [
        (2, "7", 1, 3), (2, "2.5", 0, 2), (2, "2", 0, 0),
    ]  # fmt: skip
    assert [row["samples"] for row in found[:1]] == [rows(capsys, run, 2, "--rank", "1")[3]["samples"]]
    assert main(["--run", str(run), "--worst-loss", "2"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("step 2: loss 4, 2.95 above the mean of the steps before\n")
    assert "step 2, loss 7, rank 1, micro-batch 0, row 3\n" in text


def test_one_changed_pixel_is_named_by_its_record(
    robots: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The data moved, and one frame of record 4 changed; caches are made anew, so that the scan itself sees nothing wrong."""
    demos = shutil.copytree(robots / "demos", tmp_path / "demos")
    moved = [f"data.train_data_paths=[{demos / 'demos.jsonl'}]", f"data.cache_dir={tmp_path / 'cache'}"]
    arguments = [word for one in moved for word in ("--set", one)]
    of_step = {step: {(s["record"], s["sample"]) for row in rows(capsys, robots / "run", step) for s in row["samples"]}
               for step in range(1, 7)}  # fmt: skip
    step = next(step for step, found in of_step.items() if any(record == 4 for record, _ in found))
    sample = next(sample for record, sample in of_step[step] if record == 4)
    change_pixel(demos / "traj_4" / "obs.npz", sample)
    with pytest.raises(DataError) as caught:
        main(["--run", str(robots / "run"), "--step", str(step), *arguments])
    message = str(caught.value)
    assert f"step {step}: 1 of 8 rows are not those that were trained: rank " in message
    assert f"record 4, sample {sample} of {demos / 'demos.jsonl'} (offset " in message
    assert f"these changed: files named by data.train_data_paths[0] ({demos / 'demos.jsonl'})" in message
    assert capsys.readouterr().out.count("DIFFERS FROM WHAT WAS TRAINED") == 1
    other = next(step for step, found in of_step.items() if (4, sample) not in found)
    assert all(row["trained"] for row in rows(capsys, robots / "run", other, *arguments))
    with (demos / "demos.jsonl").open() as file:
        lines = file.readlines()
    (demos / "demos.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(
        DataError, match=r"a pass over the data has \[37\] rows of mani_openpi, and had \[45\] at train"
    ):
        main(["--run", str(robots / "run"), "--step", "1", *arguments])


@pytest.mark.slow
def test_packed_chats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model_folder(tmp_path / "model", "causal")
    chats = [write_chats(tmp_path / f"{name}.jsonl", 30) for name in "ab"]
    keys = {"dataset_type": "chat", "max_seq_len": 128, "packing": True}
    config = write_config(tmp_path, model, chats, **keys)
    with serving(config) as loader:
        record_steps(config, [loader.address], tmp_path / "run", ranks=2, first_step=1, stop_step=3)
    shutil.rmtree(tmp_path / "cache")
    found = rows(capsys, tmp_path / "run", 2)
    assert len(found) == 8
    assert max(len(row["samples"]) for row in found) > 1
    text = chats[0].read_text()
    number = next(sample["record"] for row in found for sample in row["samples"] if row["entry"] == 0)
    lines = text.splitlines(keepends=True)
    chats[0].write_text("".join([*lines[:number], lines[number].replace("question", "Question"), *lines[number + 1 :]]))
    with pytest.raises(
        DataError, match=rf"1 of 8 rows .*record {number}, sample 0 of {chats[0]} .*content of data.train"
    ):
        main(["--run", str(tmp_path / "run"), "--step", "2"])


def test_a_mixture_by_tokens_with_a_bad_record(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demos = write_demonstrations(tmp_path / "demos", [6] * 6)
    (tmp_path / "demos" / "traj_2" / "obs.npz").write_bytes(b"no zip")
    config = write_config(tmp_path, model, [demos], on_bad_sample="skip", augment={"enabled": True})
    tree = yaml.safe_load(config.read_text())
    del tree["data"]["train_data_paths"], tree["data"]["dataset_type"]
    tree["data"]["weigh_by"] = "tokens"
    tree["data"]["sources"] = [
        {"dataset_type": "mani_openpi", "paths": [str(demos)], "weight": 1},
        {"dataset_type": "chat", "paths": [str(write_chats(tmp_path / "chats.jsonl", 12))], "weight": 2},
    ]
    config.write_text(yaml.safe_dump(tree))
    with serving(config) as loader:
        record_steps(config, [loader.address], tmp_path / "run", ranks=2, first_step=1, stop_step=6)
    shutil.rmtree(tmp_path / "cache")
    entries: set[int] = set()
    for step in range(1, 6):
        found = rows(capsys, tmp_path / "run", step)
        entries |= {row["entry"] for row in found}
        assert all(row["trained"] for row in found)
    assert entries == {0, 1}


def test_what_is_missing_is_said(robots: Path, tmp_path: Path) -> None:
    done = run_cli("batch", "--run", str(tmp_path), "--step", "1")
    assert done.returncode == 1
    assert done.stderr == (
        f"stoker-batch: {tmp_path}/digests-rank0.jsonl cannot be read (No such file or directory): name the output_dir of a "
        "run\n"
    )
    (tmp_path / "digests-rank0.jsonl").write_text('{"step": 1, "epo\n{"step": 1, "epoch": 0}\n')
    with pytest.raises(DataError, match="step 1 was trained by an older version, which kept no record of the run"):
        main(["--run", str(tmp_path), "--step", "1"])
    shutil.copy(robots / "run" / "digests-rank0.jsonl", tmp_path)
    with pytest.raises(DataError, match=r"not the record of a run .*: copy the whole output_dir of the run"):
        main(["--run", str(tmp_path), "--step", "1"])
