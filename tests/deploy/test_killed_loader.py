"""A real `loader-serve`, killed while a real client reads from it, under the launcher's own code."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.end_to_end.fleet import ROOT, write_config, write_demonstrations
from tests.tiny_models import write_model_folder

LAUNCH = """
import os, sys
from dataclasses import replace
from deploy import launch
from deploy.keeper import run_kept
from deploy.node import run_node

script, *arguments = sys.argv[1:]
plan = launch.make_plan(launch.parse_arguments(arguments), os.environ)
plan = replace(plan, trainer=[sys.executable, script, *arguments])
sys.exit(run_kept(lambda signals: run_node(plan, signals)))
"""
TRAINER = """
import json, os, signal, sys
from pathlib import Path
import psutil
from stoker_proto.config.reader import load_config
from stoker_proto.host.start import wait_start
from trainer.feed.feed import Feed

(address,) = wait_start(120).loader_addresses
config = load_config(Path(sys.argv[2]), [*sys.argv[4::2], f"cluster.loader_addresses=[{address}]"])
me = psutil.Process()
(loader,) = [child for child in me.parent().children() if child.pid != me.pid]
num_rows = 0
with Feed(config, "train", 0, 1) as feed:
    feed.connect()
    for step in feed.steps(0, 0):
        if step.step == 2:
            loader.send_signal(signal.SIGKILL)
            loader.wait(30)
        num_rows += sum(micro.num_rows for micro in step.micro_batches)
out = Path(config.trainer.output_dir)
out.mkdir()
(out / "summary.json").write_text(json.dumps({"rows": num_rows}))
"""


def test_the_only_loader_is_killed_and_restarted_and_the_epoch_is_read_to_its_end(tmp_path: Path) -> None:
    model = write_model_folder(tmp_path / "model")
    config = write_config(tmp_path, model, [write_demonstrations(tmp_path / "data", [9] * 12)])
    script = tmp_path / "train.py"
    script.write_text(TRAINER)
    overrides = ["cluster.component_placement={trainer: 0, dataloader: 0}", f"trainer.output_dir={tmp_path}/out"]
    arguments = ["--config", str(config), *(word for override in overrides for word in ("--set", override))]
    result = subprocess.run(
        [sys.executable, "-c", LAUNCH, str(script), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "died with exit code 137 and is restarted in 2 s, restart 1 of 10; 0 left; its last lines:" in result.stderr
    assert result.stderr.count("[loader 0] loader-serve ready") == 2
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == {"rows": 108}
