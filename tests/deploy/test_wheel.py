"""The wheel, installed into an environment that does not know this checkout, and used in a folder far from it."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
DEADLINE_S = 240.0
CONFIG = """
cluster: {component_placement: {trainer: 0, dataloader: 0}}
model: {base_model_path: model, precision: fp32}
data: {dataset_type: text, train_data_paths: [texts.jsonl], max_seq_len: 32, cache_dir: manifests}
trainer: {micro_batch_size: 2, global_batch_size: 2, lr: 1e-3, eval_interval: 0, max_steps: 2, zero_stage: 1,
  logger: {tensorboard: false}}
"""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None,
    reason="hatchling is not installed: the wheel is NOT built and NOT tried (pip install -c deploy/constraints.txt hatchling)",
)


@dataclass
class Installed:
    """A virtual environment with the wheel, and a folder to work in."""

    bin: Path
    folder: Path

    def start(self, program: str, *arguments: str) -> subprocess.Popen[str]:
        """One of its programs, in the folder, without a word of this checkout in the environment."""
        environment = {
            name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE")
        }
        environment |= {"DS_ACCELERATOR": "cpu", "PATH": f"{self.bin}:{environment['PATH']}"}
        return subprocess.Popen(
            [str(self.bin / program), *arguments],
            cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, program: str, *arguments: str) -> str:
        """Its stdout; its exit code is 0."""
        process = self.start(program, *arguments)
        try:
            stdout, stderr = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
        assert process.returncode == 0, stderr
        return stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    base = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(base), str(ROOT)]
    subprocess.run([*pip, *build], check=True, timeout=DEADLINE_S)
    [wheel] = base.glob("stoker-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(base / "venv")], check=True, timeout=DEADLINE_S)
    bin_folder = base / "venv" / "bin"
    install = ["--python", str(bin_folder / "python"), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, *install], check=True, timeout=DEADLINE_S)
    [own] = (base / "venv").glob("lib/python*/site-packages")
    # The packages of this environment, but not what its own .pth files name: this checkout.
    (own / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    folder = base / "work"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"def f_{n}(x): return x + {n}"}) + "\n" for n in range(8))
    )
    return Installed(bin_folder, folder)


def test_every_module_of_the_launcher_is_there_under_its_name(installed: Installed) -> None:
    names = sorted(
        ".".join(("stoker_deploy", *file.relative_to(ROOT / "deploy").with_suffix("").parts))
        for file in (ROOT / "deploy").rglob("*.py")
        if file.name not in ("__init__.py", "demo.py", "success.py", "wheel_hook.py")
        and (importlib.util.find_spec("ray") or file.name != "run.py")  # it imports Ray, an extra
    )
    program = (
        "import importlib, json, sys; [importlib.import_module(name) for name in sys.argv[1:]]; "
        "own = ('stoker_deploy', 'stoker_proto', 'loader_service', 'trainer', 'deploy'); "
        "print(json.dumps([m.__file__ for n, m in sys.modules.items() if n.partition('.')[0] in own]))"
    )
    files = json.loads(installed.run("python", "-P", "-c", program, *names, "trainer.main", "loader_service.cli"))
    assert len(files) > len(names)
    assert [file for file in files if not file.startswith(str(installed.bin.parent))] == []
    package = Path(next(file for file in files if file.endswith("stoker_deploy/launch.py"))).parent
    shipped = {str(file.relative_to(package)) for file in package.rglob("*") if file.suffix not in (".py", ".pyc")}
    assert {"compose.yaml", "configs/demo.yaml", "systemd/loader@.service", "systemd/trainer.env.example"} <= shipped
    assert ".env" not in shipped


@pytest.mark.slow  # three programs that import torch: half a minute of CPU
def test_it_trains_far_from_the_repository(installed: Installed) -> None:
    assert "stoker-train --config my.yaml" in installed.run("stoker-train", "--help")
    help_text = installed.run("stoker-launch", "--help")
    assert "stoker-launch --config my.yaml" in help_text
    assert "stoker_deploy" in help_text.splitlines()[-1], "the last line names the folder of the examples"
    installed.run("python", "-m", "trainer.models.tiny", "--family", "causal", "--out", "model")

    installed.run("stoker-launch", "--config", "config.yaml", "--set", "trainer.output_dir=launched")
    assert json.loads((installed.folder / "launched" / "summary.json").read_text())["steps"] == 2
    assert (installed.folder / "launched" / "export" / "model.safetensors").is_file()

    loader = installed.start("loader-serve", "--config", "config.yaml", "--bind", "tcp://127.0.0.1:*")
    try:
        assert loader.stdout is not None
        assert select.select([loader.stdout], [], [], DEADLINE_S)[0], "the loader says nothing"
        address = loader.stdout.readline().split()[2]
        more = ["--set", f"cluster.loader_addresses=[{address}]", "--set", "trainer.export=false"]
        installed.run("stoker-train", "--config", "config.yaml", *more, "--set", "trainer.output_dir=trained")
    finally:
        loader.send_signal(signal.SIGTERM)
        loader.communicate(timeout=60)
    assert json.loads((installed.folder / "trained" / "summary.json").read_text())["steps"] == 2
