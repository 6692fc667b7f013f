"""`make success`: its commands, its config for each round, and what resumes. The simulator and the training run elsewhere."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy.beside import run_beside
from deploy.success import ROOT, Step, page_of, parse, run, steps_of_round
from stoker_proto.config.reader import load_config


def test_a_rounds_config_is_one_that_loaders_and_trainer_read(tmp_path: Path) -> None:
    options = parse(["--work", str(tmp_path), "--demonstrations", "120", "--samples", "6400", "--rounds", "2"])
    first, second = steps_of_round(options, 0), steps_of_round(options, 1)
    config = load_config(tmp_path / "round-0.yaml")
    assert config.data.source_names() == ("PushCube-v1", "PullCube-v1", "PickCube-v1", "StackCube-v1")
    assert config.data.weights == (0.15, 0.12, 0.28, 0.45)
    names = [Path(path).name for path in config.data.sources[0].paths]
    assert names == ["part-00000.jsonl", "part-00050.jsonl", "part-00100.jsonl"]
    assert config.trainer.max_steps == 66  # two thirds: this round only teaches the policy that acts in DAgger
    assert (config.trainer.loss.type, config.trainer.micro_batch_size) == ("ordinal", 32)
    assert len(first) == 4 * (3 + 1) + 3  # parts and validation of each task; model, prepare, train
    later = load_config(tmp_path / "round-1.yaml")
    assert Path(later.data.sources[3].paths[-1]).name == "dagger-1.jsonl"
    assert later.model.base_model_path == str(tmp_path / "round-0" / "export")
    assert later.data.action.codec_path == str(tmp_path / "codec.json")
    assert later.trainer.max_steps == 100
    assert "--policy" in second[0].command
    assert second[-1].title == "Closed loop on held-out seeds"
    one = parse(["--work", str(tmp_path), "--task", "PushCube-v1"])
    steps_of_round(one, 0)
    assert load_config(tmp_path / "round-0.yaml").data.weights == ()


def test_another_codec_has_soft_targets_of_its_own_width(tmp_path: Path) -> None:
    steps_of_round(parse(["--work", str(tmp_path), "--task", "PushCube-v1", "--codec", "vq"]), 0)
    config = load_config(tmp_path / "round-0.yaml")
    assert (config.data.action.codec, config.trainer.loss.type, config.trainer.loss.sigma_bins) == (
        "vq",
        "ordinal",
        0.5,
    )


def test_another_seed_changes_all_but_the_evaluated_episodes(tmp_path: Path) -> None:
    """Else a second run of the recipe would say nothing about its variance, or would be measured on other episodes."""

    def commands(seed: str) -> tuple[list[str], list[str]]:
        options = parse(["--work", str(tmp_path), "--task", "PushCube-v1", "--demonstrations", "60", "--seed", seed])
        steps = [*steps_of_round(options, 0), *steps_of_round(options, 1)]
        seeds = [step.command[step.command.index("--seed") + 1] for step in steps if "--seed" in step.command]
        return seeds, list(steps[-1].command)

    (first, evaluated), (other, evaluated_too) = commands("0"), commands("3")
    assert first == ["10000", "10100", "500000", "0", "610000"]  # two parts, validation, the model, DAgger
    assert other == ["13000", "13100", "503000", "3", "613000"]
    assert evaluated == evaluated_too
    config = load_config(tmp_path / "round-1.yaml")
    assert (config.data.order.seed, config.trainer.seed) == (3, 3)
    with pytest.raises(SystemExit):
        parse(["--seed", "10"])  # DAgger's seeds would be those of the next round


def test_finished_steps_are_left_out_and_failed_ones_are_not_marked(tmp_path: Path) -> None:
    count, done = tmp_path / "count", tmp_path / "folder" / ".done"
    program = f"open({str(count)!r}, 'a').write('x')"
    step = Step("counts", [sys.executable, "-c", program], done)
    assert [run(step), run(step)] == [0, 0]
    assert count.read_text() == "x"
    failing = Step("fails", [sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "other")
    assert run(failing) == 3
    assert not (tmp_path / "other").exists()


def test_a_step_that_is_interrupted_ends_and_is_not_marked(tmp_path: Path) -> None:
    """SIGTERM reaches `make success` alone: it must not leave loaders and ranks behind."""
    started, ended = tmp_path / "started", tmp_path / "ended"
    waits = (
        "import pathlib, signal, sys, time\n"
        "def end(*_):\n"
        "    time.sleep(2)  # saves its run\n"
        f"    sys.exit(pathlib.Path({str(ended)!r}).write_text('x') and 0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        f"pathlib.Path({str(started)!r}).touch()\n"
        "time.sleep(300)\n"
    )
    program = (
        "import sys; from pathlib import Path; from deploy import success; from deploy.child import interrupt_on_sigterm\n"
        "interrupt_on_sigterm()\n"
        f"success.run(success.Step('waits', [sys.executable, '-c', {waits!r}], Path({str(tmp_path / '.done')!r})))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not started.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) != 0
        assert ended.exists()
        assert not (tmp_path / ".done").exists()
    finally:
        process.kill()
        process.communicate()


def test_an_interrupted_part_is_collected_anew_and_a_complete_one_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "PushCube-v1"
    (folder / "part-00000").mkdir(parents=True)
    (folder / "part-00000.jsonl").write_text("{}\n")
    (folder / "val.jsonl").write_text("{}\n")
    (folder / ".val.done").touch()
    steps_of_round(parse(["--work", str(tmp_path), "--task", "PushCube-v1", "--demonstrations", "50"]), 0)
    assert sorted(path.name for path in folder.iterdir()) == [".val.done", "val.jsonl"]


def test_the_page_has_rates_with_intervals_and_the_videos() -> None:
    rate = {"value": 0.9, "low": 0.82, "high": 0.95}
    figures = {"episodes": 100, "success_once": rate, "success_at_end": rate, "steps_to_success": None}
    text = page_of({"summary": {"model": {"Push<Cube": figures}}}, ["a b.mp4"])
    assert "<td>Push&lt;Cube</td><td>100</td><td>90.0% [82.0, 95.0]</td>" in text
    assert 'src="videos/a b.mp4"' in text


def test_a_collector_runs_beside_the_training_with_a_checkpoint_that_outlives_the_trainings_own(tmp_path: Path) -> None:
    """The training below ends only once something was collected beside it; one after the other would never end."""
    run_folder, collected = tmp_path / "round-0", tmp_path / "collected"
    training = (
        "import pathlib, shutil, sys, time\n"
        f"run, collected = pathlib.Path({str(run_folder)!r}), pathlib.Path({str(collected)!r})\n"
        "(run / 'checkpoints/step-00000500/deepspeed').mkdir(parents=True)\n"
        "(run / 'checkpoints/step-00000500/deepspeed/weights').write_text('500')\n"
        "while not (run / 'acting/step-00000500').exists(): time.sleep(0.02)\n"
        "shutil.rmtree(run / 'checkpoints/step-00000500')\n"  # as the training does with its older ones
        "(run / 'checkpoints/deleted').touch()\n"
        "deadline = time.monotonic() + 120\n"
        "while not collected.exists() and time.monotonic() < deadline: time.sleep(0.02)\n"
        "(run / 'export').mkdir()\n"
        "sys.exit(0 if collected.exists() else 9)\n"
    )
    collector = (
        "import pathlib, sys, time\n"
        f"deleted = pathlib.Path({str(run_folder / 'checkpoints' / 'deleted')!r})\n"
        "while not deleted.exists(): time.sleep(0.02)\n"
        f"pathlib.Path({str(collected)!r}).write_text((pathlib.Path(sys.argv[1]) / 'deepspeed/weights').read_text())\n"
    )
    policies = []

    def first(policy: Path) -> list[str]:
        policies.append(policy)
        return [sys.executable, "-c", collector, str(policy)]

    def second(policy: Path) -> list[str]:
        policies.append(policy)
        return [sys.executable, "-c", "raise SystemExit(4)"]

    command = [sys.executable, "-c", training]
    assert run_beside(command, run_folder, [first, second, first], tmp_path) == (0, [0, 4]), "a failed one is the last"
    assert collected.read_text() == "500"
    assert policies == [run_folder / "acting" / "step-00000500", run_folder / "export"]
    failing = [sys.executable, "-c", "raise SystemExit(3)"]
    assert run_beside(failing, tmp_path / "round-1", [first], tmp_path) == (3, []), "no policy comes of it"


def test_with_overlap_the_next_rounds_episodes_are_collected_beside_a_training(tmp_path: Path) -> None:
    usual = ["--work", str(tmp_path), "--task", "PushCube-v1", "--task", "PickCube-v1", "--rounds", "2"]
    options = parse([*usual, "--overlap"])
    training = steps_of_round(options, 0)[-1]
    assert [(part.task, part.name) for part in training.beside] == [
        ("PushCube-v1", "dagger-1"),
        ("PickCube-v1", "dagger-1"),
    ]
    last = steps_of_round(options, 1)
    assert all(not step.beside for step in last), "nothing follows the last round"
    assert load_config(tmp_path / "round-1.yaml").data.sources[1].paths[-1].endswith("PickCube-v1/dagger-1.jsonl")
    assert not steps_of_round(parse(usual), 0)[-1].beside


def test_a_run_goes_on_from_the_newest_model_of_another(tmp_path: Path) -> None:
    other = tmp_path / "other"
    for number in (2, 10):
        (other / f"round-{number}" / "export").mkdir(parents=True)
    for name in ("codec.json", "state.json"):
        (other / name).touch()
    options = parse(["--work", str(tmp_path / "new"), "--task", "PushCube-v1", "--from", str(other)])
    options.work.mkdir()
    steps = steps_of_round(options, 0)
    config = load_config(tmp_path / "new" / "round-0.yaml")
    assert config.model.base_model_path == str(other / "round-10" / "export")
    assert config.data.action.codec_path == str(tmp_path / "new" / "codec.json")
    assert [step.title.split()[0] for step in steps[-2:]] == ["10", "Loaders"], "no model is made and no codec fitted"
    (other / "state.json").unlink()
    with pytest.raises(SystemExit):
        parse(["--from", str(other)])
