"""What each node of a run starts: ranks, ports, addresses, environment; and what ssh is asked to run."""

from __future__ import annotations

import base64
import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from deploy import launch
from deploy.nodes import facts
from deploy.nodes.plan import LocalPlan, RunOptions, make_local_plan
from deploy.nodes.start import make_nodes_plan
from stoker_proto.config.reader import load_config
from stoker_proto.errors import ConfigError

CONFIG = """
cluster: {num_nodes: 2, component_placement: {trainer: 0-2, dataloader: 0-3}}
model: {base_model_path: m}
data: {dataset_type: mani_openpi, train_data_paths: [t.jsonl], max_seq_len: 64}
trainer: {micro_batch_size: 2, global_batch_size: 12, lr: 1e-3, output_dir: out}
"""
FACTS = [{"host": "a", "address": "10.0.0.1", "devices": 0}, {"host": "b", "address": "10.0.0.2", "devices": 0}]
READY = [
    {"loaders": ["tcp://10.0.0.1:7001", "tcp://10.0.0.1:7002"], "port": 41000},
    {"loaders": ["tcp://10.0.0.2:7001", "tcp://10.0.0.2:7002"], "port": 42000},
]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


def plan_of(
    node: int,
    file: Path,
    *overrides: str,
    devices: int = 0,
    environment: Mapping[str, str] | None = None,
    **options: Any,
) -> LocalPlan:
    facts = [{**one, "devices": devices} for one in FACTS]
    run_options = RunOptions(
        common=("--config", str(file)), environment=environment or {"DS_ACCELERATOR": "cpu"}, **options
    )
    return make_local_plan(node, facts, load_config(file, overrides), run_options)


def world_of(command: list[str]) -> Any:
    text = next(word for word in command if word.startswith("--world_info="))
    return json.loads(base64.urlsafe_b64decode(text.partition("=")[2]))


def test_ranks_meet_on_the_node_of_rank_0_and_ask_the_loaders_of_all_nodes(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    plans = [plan_of(node, config_file, slots_per_node=2) for node in range(2)]
    assert [plan.ranks for plan in plans] == [(0, 1), (2,)]
    commands = [plan.trainer(READY) for plan in plans]
    for node, command in enumerate(commands):
        assert command[1:4] == ["-u", "-m", "deepspeed.launcher.launch"]
        assert world_of(command) == {"node0": [0, 1], "node1": [0]}
        assert f"--node_rank={node}" in command
        assert "--master_addr=10.0.0.1" in command
        assert "--master_port=41000" in command
        config = load_config(config_file, [command[-1]])
        assert config.cluster.loader_addresses == (*READY[0]["loaders"], *READY[1]["loaders"])
    environment = plans[1].trainer_environment("eth7")
    assert (environment["OMP_NUM_THREADS"], environment["DS_ACCELERATOR"]) == ("6", "cpu")
    assert environment["GLOO_SOCKET_IFNAME"] == "eth7"


def test_loaders_listen_on_their_node_s_address(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    plan = plan_of(1, config_file, slots_per_node=2, loader_restarts=3)
    common = ["--config", str(config_file), "--bind", "tcp://10.0.0.2:*", "--set", "loader.cores=4"]
    assert plan.loaders.commands == ((sys.executable, "-m", "loader_service.cli", "serve", *common),) * 2
    assert plan.loaders.max_restarts == 3
    assert plan_of(1, config_file, slots_per_node=2, insecure=True).loaders.commands[0][-1] == "--insecure"
    assert plan_of(1, config_file, slots_per_node=2, has_loaders=False).loaders.commands == ()


def test_a_node_without_ranks_only_loads_and_rank_0_is_on_the_other(config_file: Path) -> None:
    placement = "cluster.component_placement={trainer: 4-7, dataloader: 0-3}"
    plan = plan_of(1, config_file, placement, "trainer.global_batch_size=16")
    assert plan.without_ranks == {0}
    assert plan.first == 1
    command = plan.trainer(READY)
    assert world_of(command) == {"node1": [0, 1, 2, 3]}
    assert {"--node_rank=0", "--master_addr=10.0.0.2", "--master_port=42000"} <= set(command)


def test_each_node_s_own_devices(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_count_cuda_devices", lambda environment: 4)
    placement = ("cluster.component_placement={trainer: 0-5}", "trainer.global_batch_size=12")
    environment = {"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    plan = plan_of(1, config_file, *placement, devices=4, environment=environment)
    assert world_of(plan.trainer(READY)) == {"node0": [0, 1, 2, 3], "node1": [4, 5]}
    assert "CUDA_VISIBLE_DEVICES" not in plan.trainer_environment(None)


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        (["cluster.component_placement={trainer: 0-5}"], {"slots_per_node": 2}, "2 nodes of 2 slots have slots 0 to 3"),
        (["cluster.component_placement={trainer: 0-1}"], {"slots_per_node": 2}, "lies on node 1 (slots 2 to 3)"),
        (["cluster.component_placement={dataloader: 0-1}"], {}, "component_placement.trainer is empty"),
    ],
)
def test_a_placement_that_does_not_fit(
    config_file: Path, overrides: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(0, config_file, *overrides, **options)
    assert message in str(caught.value)


def test_what_ssh_runs_on_another_node(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command in the same folder; variables that may hold a secret are not passed on."""
    monkeypatch.chdir(tmp_path)
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=2\nb slots=2\n")
    command = ["--config", str(config_file), "--hostfile", str(hosts), "--ssh", "ssh -p 2222", "--insecure"]
    options = launch.parse_arguments([*command, "--set", "trainer.epochs=2", "--node-lost-s", "7"])
    config = load_config(config_file)
    environment = {"DS_ACCELERATOR": "cpu", "WANDB_API_KEY": "secret", "HF_TOKEN": "secret", "NCCL_DEBUG": "INFO x"}
    membership = launch.find_membership(options, environment, 2)
    assert membership is not None
    *ssh, host, remote = make_nodes_plan(options, config, membership, environment).other_command(1, "b")
    assert (ssh, host) == (["ssh", "-p", "2222"], "b")
    assert "secret" not in remote
    words = shlex.split(remote)
    assert words[:5] == ["cd", str(tmp_path), "&&", "exec", "env"]
    assert words[5:7] == ["DS_ACCELERATOR=cpu", "NCCL_DEBUG=INFO x"]
    assert words[7:9] == [sys.executable, str(launch.ROOT / "deploy" / "launch.py")]
    there = launch.parse_arguments(words[9:])
    assert (there.node_rank, there.master_addr, there.slots_per_node, there.node_lost_s) == (1, "a", 2, 7.0)
    assert (there.set, there.insecure, there.no_loaders) == (["trainer.epochs=2"], True, False)


def test_without_keys_nothing_is_started_over_a_network(config_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["--config", str(config_file), "--node-rank", "0", "--master-addr", "10.0.0.1"]
    assert launch.main(command) == 1
    error = capfd.readouterr().err
    assert "2 nodes talk over the network, and cluster.security names no keys: make them with loader-keys" in error
    assert error.count("\n") == 1


def test_nodes_that_would_log_digests_by_different_rules_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node without xxhash: its rows could not be compared with those of the others."""
    here = facts.versions()
    monkeypatch.setattr(facts, "RULE", 1)
    found = facts.difference([("a", {"versions": here}), ("b", {"versions": facts.versions()})])
    assert found is not None
    assert "the rule of row digests (2 needs xxhash)" in found
