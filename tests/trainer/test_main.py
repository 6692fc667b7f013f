"""`python trainer/main.py` as a user meets it: one line per mistake, an exit code that is not 0, no traceback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stoker_proto.host.ports import free_port
from stoker_proto.host.start import Start, StartSender
from trainer import main
from trainer.cli import parse_arguments, read_config

ROOT = Path(main.__file__).resolve().parents[1]
CONFIG = """
model: {{base_model_path: {model}}}
data: {{dataset_type: mani_openpi, train_data_paths: [none.jsonl], max_seq_len: 64}}
trainer: {{micro_batch_size: 2, global_batch_size: 8, lr: 2e-5, output_dir: {output}}}
"""


def start(tmp_path: Path, model: Path, *overrides: str, **environment: str) -> tuple[int, list[str]]:
    """Exit code and the lines on stderr of a trainer started far from the repository."""
    return end(begin(tmp_path, model, *overrides, **environment))


def begin(tmp_path: Path, model: Path, *overrides: str, **environment: str) -> subprocess.Popen[str]:
    """A trainer of its own, far from the repository."""
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(model=model, output=tmp_path / "out"))
    command = [sys.executable, str(ROOT / "trainer" / "main.py"), "--local_rank=0", "--config", str(config)]
    for override in overrides:
        command += ["--set", override]
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Exit code and the lines on stderr."""
    try:
        stdout, stderr = process.communicate(timeout=240)
    finally:
        process.kill()
    assert stdout == ""
    assert "Traceback" not in stderr
    return process.returncode, stderr.strip().splitlines()


@pytest.mark.process
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.learning_rate=1", "error: trainer.learning_rate: unknown key; known here: micro_batch_size"),
        (
            "model.base_model_path=/not/here",
            "error: model.base_model_path is '/not/here': there is no folder /not/here; name",
        ),
        (
            "trainer.global_batch_size=7",
            "error: trainer.global_batch_size is 7, but micro_batch_size 2 x 1 trainer ranks",
        ),
        ("cluster.component_placement.trainer=0-1", "names 2 slots, but the launcher started 1 ranks: start as many"),
    ],
)
def test_a_mistake_in_the_config_is_one_line(override: str, message: str, tiny_causal: Path, tmp_path: Path) -> None:
    code, lines = start(tmp_path, tiny_causal, override)
    assert code == 1
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.process
def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    code, lines = start(tmp_path, tmp_path)
    assert (code, len(lines)) == (1, 1)
    assert lines[0].endswith(f"there is no file {tmp_path}/config.json; name the folder of a downloaded model "
                             "(config.json, weights, tokenizer.json)")  # fmt: skip


@pytest.mark.process
def test_no_loader_is_one_line_after_the_deadline(tiny_causal: Path, tmp_path: Path) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    code, lines = start(
        tmp_path, tiny_causal, f"cluster.loader_addresses=[{address}]", "trainer.feed.connect_deadline_s=0.5"
    )
    errors = [line for line in lines if line.startswith("error:")]
    assert (code, len(errors)) == (1, 1)
    assert address in errors[0]


@pytest.mark.process
def test_a_second_run_in_the_same_folder_is_refused_and_ctrl_c_ends_the_first(
    tiny_causal: Path, tmp_path: Path
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # nobody listens: the first run waits for its loader
        patient = (
            f"cluster.loader_addresses=[tcp://127.0.0.1:{silent.getsockname()[1]}]",
            "trainer.feed.connect_deadline_s=600",
        )
        first = begin(tmp_path, tiny_causal, *patient)
        try:
            deadline = time.monotonic() + 240
            while not (tmp_path / "out" / "in-use").exists():
                assert first.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            code, lines = start(tmp_path, tiny_causal, *patient)
            assert code == 1
            assert lines[-1].startswith(
                f"error: trainer.output_dir is '{tmp_path / 'out'}': process {first.pid} on host "
            )
            assert [path.name for path in (tmp_path / "out").iterdir()] == ["in-use"]
            first.send_signal(signal.SIGINT)
        except BaseException:
            first.kill()
            raise
        code, lines = end(first)
    assert code == 130
    assert lines[-1].endswith("rank 0 WARNING interrupted by SIGINT before its first step")


def test_the_scripts_own_folder_leaves_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "trainer"), "/somewhere/else"])
    main.use_source_roots()
    assert sys.path == [str(ROOT), str(ROOT / "proto"), "/somewhere/else"]


def test_ranks_that_wait_for_the_loaders_get_the_config_that_set_would_have_given(
    tiny_causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses, sender = ["tcp://127.0.0.1:7001", "tcp://127.0.0.1:7002"], StartSender()
    (tmp_path / "config.yaml").write_text(CONFIG.format(model=tiny_causal, output=tmp_path / "out"))
    common = ["--config", str(tmp_path / "config.yaml"), "--set", "cluster.loader_addresses=[tcp://10.0.0.1:1]"]
    stdin = os.dup(0)
    monkeypatch.setenv("MASTER_PORT", "0")
    os.dup2(sender.for_ranks.fileno(), 0)
    try:
        sender.send(Start(loader_addresses=tuple(addresses), master_port=4242))
        sender.close()
        options = parse_arguments([*common, "--start-within-s", "60"])
        main.await_loaders(options)
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)
    given = parse_arguments([*common, "--set", f"cluster.loader_addresses={json.dumps(addresses)}"])
    assert read_config(options) == read_config(given)
    assert read_config(options).cluster.loader_addresses == tuple(addresses)
    assert os.environ["MASTER_PORT"] == "4242"
