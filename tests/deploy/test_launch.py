"""What launch.py would start for a config, and DeepSpeed's real launcher under it."""

import argparse
import base64
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploy import launch
from deploy.node import Plan
from stoker_proto.config.reader import load_config
from stoker_proto.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
ADDRESSES = ["tcp://127.0.0.1:7001", "tcp://127.0.0.1:7002"]
CONFIG = """
cluster: {component_placement: {trainer: 0-1, dataloader: 0-2}, loader_addresses: ["tcp://10.0.0.9:5555"]}
model: {base_model_path: m}
data: {dataset_type: mani_openpi, train_data_paths: [t.jsonl], max_seq_len: 64}
trainer: {micro_batch_size: 2, global_batch_size: 8, lr: 1e-3}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
    return file


def plan_for(file: Path, *overrides: str, environment: Mapping[str, str] | None = None, **options: Any) -> Plan:
    fields = {
        "config": file,
        "set": list(overrides),
        "no_loaders": False,
        "ready_deadline_s": 5.0,
        "loader_restarts": 4,
        **options,
    }
    return launch.make_plan(argparse.Namespace(**fields), environment or {"DS_ACCELERATOR": "cpu"})


def words_after(command: Sequence[str], flag: str) -> list[str]:
    return [following for word, following in itertools.pairwise(command) if word == flag]


def world_of(command: Sequence[str]) -> dict[str, list[int]]:
    (world,) = [word.removeprefix("--world_info=") for word in command if word.startswith("--world_info=")]
    return dict(json.loads(base64.urlsafe_b64decode(world)))


def test_one_loader_per_dataloader_slot_on_a_free_loopback_port(config_file: Path) -> None:
    plan = plan_for(config_file, "trainer.epochs=2", "loader.cores=1")
    assert len(plan.loaders.commands) == 3
    for command in plan.loaders.commands:
        assert command[:4] == (sys.executable, "-m", "loader_service.cli", "serve")
        assert words_after(command, "--bind") == ["tcp://127.0.0.1:*"]
        assert words_after(command, "--config") == [str(config_file)]
        assert words_after(command, "--set") == ["trainer.epochs=2", "loader.cores=1"]


def test_loaders_of_one_node_share_its_cores(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    assert words_after(plan_for(config_file).loaders.commands[0], "--set") == ["loader.cores=4"]


def test_the_trainer_waits_for_the_launchers_own_loaders_somewhat_longer_than_the_launcher(config_file: Path) -> None:
    command = list(plan_for(config_file, "trainer.epochs=2").trainer)
    assert words_after(command, "--set") == ["trainer.epochs=2"]
    assert words_after(command, "--start-within-s") == ["65"]
    assert words_after(command, "-m") == ["deepspeed.launcher.launch"]
    assert world_of(command) == {"localhost": [0, 1]}
    assert "--master_addr=127.0.0.1" in command
    assert str(ROOT / "trainer" / "main.py") in command


def test_ranks_that_save_have_somewhat_more_time_than_they_take_themselves(config_file: Path) -> None:
    assert plan_for(config_file, "trainer.checkpoint.stop_grace_s=100").trainer_grace_s == 120


def test_without_loaders_of_its_own_the_configured_addresses_are_used(config_file: Path) -> None:
    plan = plan_for(config_file, no_loaders=True)
    assert plan.loaders.commands == ()
    assert words_after(plan.trainer, "--start-within-s") == []
    config = load_config(config_file, words_after(plan.trainer, "--set"))
    assert config.cluster.loader_addresses == ("tcp://10.0.0.9:5555",)


def test_ranks_on_the_cpu_share_the_cores_unless_the_user_says_otherwise(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    environment = plan_for(config_file).trainer_environment
    assert environment["OMP_NUM_THREADS"] == "4", "a quarter of the cores is left to the three loaders"
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment["DS_ACCELERATOR"] == "cpu"
    assert plan_for(config_file).cores.startswith(
        "12 cores: 2 ranks with OMP_NUM_THREADS=4 and OMP_WAIT_POLICY=PASSIVE; 3 cores are left to 3 loaders"
    )
    assert plan_for(config_file, "loader.cores=2").trainer_environment["OMP_NUM_THREADS"] == "3"
    assert plan_for(config_file, no_loaders=True).trainer_environment["OMP_NUM_THREADS"] == "6"
    own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "ACTIVE"}
    chosen = plan_for(config_file, environment=own).trainer_environment
    assert (chosen["OMP_NUM_THREADS"], chosen["OMP_WAIT_POLICY"]) == ("1", "ACTIVE")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert plan_for(config_file).trainer_environment["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, [0, 1]), ("4,6,7", [4, 6]), ("2, 0", [2, 0])],
)
def test_ranks_get_exactly_the_trainer_slots(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: list[int]
) -> None:
    num_devices = 8 if visible is None else len(visible.split(","))
    monkeypatch.setattr(launch, "_count_cuda_devices", lambda environment: num_devices)
    environment = {"DS_ACCELERATOR": "cuda"} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    plan = plan_for(config_file, environment=environment)
    assert world_of(plan.trainer) == {"localhost": expected}
    assert "CUDA_VISIBLE_DEVICES" not in plan.trainer_environment
    assert plan.trainer_environment["DS_ACCELERATOR"] == "cuda"


def test_a_slot_without_a_device_is_refused(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_count_cuda_devices", lambda environment: 1)
    with pytest.raises(ConfigError, match="names slot 1, but this node shows 1 devices: name slots below 1"):
        plan_for(config_file, environment={"DS_ACCELERATOR": "cuda"})


def test_devices_named_by_uuid_are_refused(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_count_cuda_devices", lambda environment: 2)
    with pytest.raises(ConfigError, match="device numbers only"):
        plan_for(config_file, environment={"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"})


def test_a_torch_without_devices_means_cpu(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_DEVICE_FILES", (os.devnull,))
    monkeypatch.setattr(launch, "_count_cuda_devices", lambda environment: 0)
    assert plan_for(config_file, environment={"PATH": ""}).trainer_environment["DS_ACCELERATOR"] == "cpu"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.num_nodes=2", "nothing says which node this is"),
        ("cluster.component_placement={dataloader: 0-1}", "trainer is empty"),
        ("trainer.epoch=1", "did you mean trainer.epochs"),
    ],
)
def test_what_cannot_be_started_is_one_line_and_exit_code_1(
    config_file: Path, capfd: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert launch.main(["--config", str(config_file), "--set", override]) == 1
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_program_runs_from_another_folder_without_being_installed(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, str(ROOT / "deploy" / "launch.py"), "--config", "missing.yaml"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert re.fullmatch(r"\[launch\] error: missing\.yaml: .*\n", result.stderr)


SCRIPT = """
import json, os, sys, time
from pathlib import Path

names = ("RANK", "WORLD_SIZE", "DS_ACCELERATOR", "MASTER_PORT")
here = Path(__file__).parent
seen = {"arguments": sys.argv[1:], **{name: os.environ.get(name) for name in names}}
(here / "part").mkdir(exist_ok=True)
part = here / "part" / f"rank{seen['RANK']}.json"
part.write_text(json.dumps(seen))
part.rename(here / part.name)
end = time.monotonic() + 60  # the first rank that ends with an error ends the others
while len(list(here.glob("rank*.json"))) < 2 and time.monotonic() < end:
    time.sleep(0.02)
sys.exit(3)
"""


def two_ranks(script: Path) -> list[str]:
    """DeepSpeed's real command for two ranks that run the script, which stands in for trainer/main.py."""
    pytest.importorskip("deepspeed", reason="the trainer's extra is not installed")
    return launch.trainer_command(["--config", "c.yaml"], ADDRESSES, 2, None, script)


def launched(command: list[str], folder: Path) -> subprocess.Popen[str]:
    """The launcher around the command."""
    plan = {
        "loaders": {"commands": [], "ready_deadline_s": 5.0},
        "trainer": command,
        "completion_record": str(folder / "summary.json"),
    }
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(launch.SOURCE_ROOTS)}
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("run_plan.py")), json.dumps(plan)],
        env=launch.trainer_environment(environment, 2, None),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_deepspeed_runs_the_script_on_each_slot_and_its_exit_code_comes_back(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    process = launched(command := two_ranks(script), tmp_path)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 3, stderr
    for rank in ("0", "1"):
        seen = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert (seen["RANK"], seen["WORLD_SIZE"], seen["DS_ACCELERATOR"]) == (rank, "2", "cpu")
        assert seen["arguments"] == [
            f"--local_rank={rank}",
            *("--config", "c.yaml"),
            *("--set", f"cluster.loader_addresses={json.dumps(ADDRESSES)}"),
        ]
        assert f"--master_port={seen['MASTER_PORT']}" in command


SLEEPING_SCRIPT = """
import os, time
from pathlib import Path

here = Path(__file__).parent
part = here / f"part{os.environ['RANK']}"
part.write_text(f"{os.getpid()} {os.getppid()}")
part.rename(here / f"rank{os.environ['RANK']}")
time.sleep(60)
"""


def started_ranks(process: subprocess.Popen[str], folder: Path) -> list[Path]:
    """The files of both ranks, once they are there."""
    files, end = [folder / "rank0", folder / "rank1"], time.monotonic() + 240
    while not all(file.exists() for file in files):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.02)
    return files


def test_deepspeed_whose_launcher_and_ranks_were_killed_is_no_success(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SLEEPING_SCRIPT)
    process = launched(two_ranks(script), tmp_path)
    try:
        ranks, parents = zip(
            *(map(int, file.read_text().split()) for file in started_ranks(process, tmp_path)), strict=True
        )
        for pid in (parents[0], *ranks):
            os.kill(pid, signal.SIGKILL)
        _, stderr = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGKILL, stderr


SAVING_SCRIPT = f"""
import os, sys, time
from pathlib import Path
sys.path[:0] = {list(launch.SOURCE_ROOTS)!r}
from trainer.process.parents import DeepSpeedParents
from trainer.process.signals import StopSignals

here, rank = Path(__file__).parent, os.environ["RANK"]
stop = StopSignals(DeepSpeedParents.find())
stop.begin_training(60.0)
(here / f"rank{{rank}}").touch()
try:
    while not stop.requested:
        time.sleep(0.01)
except KeyboardInterrupt:
    time.sleep(60)  # until DeepSpeed's SIGTERM
time.sleep(1.0)  # as writing a checkpoint takes
(here / f"saved{{rank}}").touch()
while not all((here / f"saved{{one}}").exists() for one in (0, 1)):  # as ranks leave together
    time.sleep(0.01)
sys.exit(128 + stop.requested)
"""


def test_ctrl_c_while_deepspeed_is_still_imported_is_no_traceback(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("")
    process = launched(two_ranks(script), tmp_path)
    try:
        end = time.monotonic() + 240
        while not _imports(process.pid):
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=240)
    finally:
        process.kill()
    assert stderr == "[launch] SIGINT: passed on to the trainer, which has 45 s; once more kills it\n"
    assert process.returncode == 128 + signal.SIGINT


def _imports(launcher: int) -> bool:
    """Whether DeepSpeed's launcher runs below and has read torch's libraries."""
    for process in psutil.Process(launcher).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, OSError):
            if "torch" in Path(f"/proc/{process.pid}/maps").read_text():
                return True
    return False


@pytest.mark.parametrize(
    ("sent", "saved", "line"),
    [
        (signal.SIGTERM, ["saved0", "saved1"], "SIGTERM: a checkpoint is written after this step, then the run ends"),
        (signal.SIGINT, [], "interrupted by SIGINT before its first step"),
    ],
)
def test_a_stop_signal_reaches_each_rank_once(
    tmp_path: Path, sent: signal.Signals, saved: list[str], line: str
) -> None:
    """DeepSpeed's launcher repeats a SIGTERM that it gets itself, kills ranks after 30 s and ends with 1."""
    script = tmp_path / "train.py"
    script.write_text(SAVING_SCRIPT)
    process = launched(two_ranks(script), tmp_path)
    try:
        started_ranks(process, tmp_path)
        process.send_signal(sent)
        _, stderr = process.communicate(timeout=240)
    finally:
        process.kill()
    assert sorted(file.name for file in tmp_path.glob("saved*")) == saved, stderr
    assert process.returncode == 128 + sent, stderr
    assert [one for one in stderr.splitlines() if "[launch]" not in one] == [line]
