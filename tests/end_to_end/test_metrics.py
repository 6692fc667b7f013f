"""Metrics as Prometheus scrapes them, of real processes; alert rules and dashboards name only what a scrape has."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
import zmq

from stoker_proto.fleet.metrics import METRICS, parse
from stoker_proto.host.ports import free_port
from tests.end_to_end.conftest import LENGTHS
from tests.end_to_end.fleet import ROOT, environment, run_cli, serving, wait_until, write_config, write_demonstrations

PROMETHEUS = ROOT / "deploy" / "prometheus"
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="promtool is not installed (Debian: prometheus): rules and metrics are NOT checked",
)


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        return str(answer.read().decode())


def has_metrics(port: int, name: str, least: float) -> bool:
    """Whether something answers there, with so much of a metric."""
    try:
        return parse(scrape(port)).get(name, {}).get((), -1) >= least
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[tuple[str, str]]:
    """(of a loader that served an epoch, of the trainer that trained it). One of the 20 records is bad."""
    folder = tmp_path_factory.mktemp("metrics")
    demos = write_demonstrations(folder / "demos", LENGTHS, size=96)
    config = write_config(folder, model, [demos], on_bad_sample="skip", bad_sample_budget=100)
    run_cli("prepare", "--config", str(config))
    (folder / "demos" / "traj_4" / "obs.npz").write_bytes(b"no zip")  # 12 samples
    ports = free_port(), free_port()
    with serving(config, "--metrics", f"127.0.0.1:{ports[0]}", "--set", "loader.workers=2") as loader:
        assert parse(scrape(ports[0]))["stoker_loader_samples_total"] == {(): 0.0}
        with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
            stranger.setsockopt(zmq.LINGER, 0)
            stranger.connect(loader.address)
            stranger.send(b"GET / HTTP/1.1")
            refused = "stoker_loader_refused_peers_total"
            wait_until(lambda: parse(scrape(ports[0]))[refused]["message",] == 1, 60, "the stranger is counted")
        command = [sys.executable, "-m", "trainer.bench.command", "--config", str(config), "--connect", loader.address]
        command += ["--step-time-ms", "400", "--metrics", f"127.0.0.1:{ports[1]}"]
        bench = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
        try:
            wait_until(lambda: has_metrics(ports[1], "stoker_trainer_steps_total", 12), 120, "twelve steps")
            of_trainer = scrape(ports[1])
            assert bench.communicate(timeout=120)[0]
        finally:
            bench.kill()
            bench.wait()
        yield scrape(ports[0]), of_trainer


def test_every_metric_of_the_table_is_in_a_scrape(scraped: tuple[str, str]) -> None:
    loader, trainer = map(parse, scraped)
    assert set(loader) | set(trainer) == set(METRICS)
    assert all(name.startswith("stoker_loader_") for name in loader)
    assert all(name.startswith("stoker_trainer_") for name in trainer)


def test_a_loader_counts_what_it_did(scraped: tuple[str, str]) -> None:
    found = parse(scraped[0])
    single = {name: values[()] for name, values in found.items() if () in values}
    assert single["stoker_loader_samples_total"] == sum(LENGTHS) == 129
    assert single["stoker_loader_bad_samples_total"] == 12
    assert single["stoker_loader_records_decoded_total"] == single["stoker_loader_records_distinct_total"] == 20
    assert single["stoker_loader_ready"] == 1
    assert found["stoker_loader_tickets"] == {("waiting",): 0, ("building",): 0}
    assert found["stoker_loader_refused_peers_total"] == {("key",): 0, ("fingerprint",): 0, ("message",): 1}
    answers = found["stoker_loader_answers_total"]
    assert answers["piece",] >= 17, "17 micro-batches or more tickets"
    assert sum(answers.values()) == answers["piece",]
    # Each ticket looks up each of its records once.
    assert single["stoker_loader_cache_hits_total"] + single["stoker_loader_cache_misses_total"] >= answers["piece",]
    assert 0 < single["stoker_loader_cache_bytes"] < single["stoker_loader_cache_limit_bytes"]
    assert single["stoker_loader_resident_bytes"] > 50e6, "three processes"
    assert single["stoker_loader_sent_bytes_total"] > 129 * 400
    assert single["stoker_loader_unread_bytes"] == single["stoker_loader_dropped_frames_total"] == 0


def test_stages_add_up_to_the_time_in_which_threads_were_busy(scraped: tuple[str, str]) -> None:
    found = parse(scraped[0])
    stages = {stage: seconds for (stage,), seconds in found["stoker_loader_stage_seconds_total"].items()}
    assert list(stages) == ["read", "inflate", "decode", "resize", "encode", "tokenise", "pack", "queue", "send"]
    assert stages.pop("decode") == 0, "frames of an NPZ are pixels"
    assert min(stages.values()) > 0
    busy = sum(seconds for stage, seconds in stages.items() if stage not in ("queue", "send"))
    threads, uptime = found["stoker_loader_threads"][()], found["stoker_loader_uptime_seconds"][()]
    assert 0 < busy < threads * uptime


def test_the_trainer_says_what_it_had_of_whom(scraped: tuple[str, str]) -> None:
    found = parse(scraped[1])
    [(address,)] = found["stoker_trainer_loader_ready"]
    assert address.startswith("tcp://127.0.0.1:")
    assert found["stoker_trainer_loader_ready"] == {(address,): 1}
    assert found["stoker_trainer_loader_share"] == {(address,): 1}
    steps = found["stoker_trainer_steps_total"][()]
    assert found["stoker_trainer_samples_total"][()] == 8 * steps
    assert found["stoker_trainer_loader_samples_total"][address,] >= 8 * steps
    assert found["stoker_trainer_step_seconds_total"][()] >= 0.4 * steps
    assert 0 <= found["stoker_trainer_data_wait_seconds_total"][()] < found["stoker_trainer_step_seconds_total"][()]
    assert found["stoker_trainer_info"] == {("1",): 1}
    assert found["stoker_trainer_tickets_total"][()] >= steps


def test_alert_rules_name_only_metrics_that_a_scrape_has(scraped: tuple[str, str]) -> None:
    known = set(parse("".join(scraped)))
    named = set(re.findall(r"\bstoker_\w+", (PROMETHEUS / "alerts.yml").read_text()))
    assert len(named) >= 10
    assert named - known == set()


@needs_promtool
def test_promtool_accepts_the_rules_and_the_scrape(scraped: tuple[str, str]) -> None:
    rules = subprocess.run(
        ["promtool", "check", "rules", str(PROMETHEUS / "alerts.yml")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (rules.returncode, rules.stderr) == (0, "")
    for text in scraped:
        linted = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60, check=False
        )
        assert (linted.returncode, linted.stderr, linted.stdout) == (0, "", "")


def queries() -> list[tuple[str, str]]:
    """(query, legend) of each line of the dashboard."""
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "stoker.json").read_text())
    return [(line["expr"], line["legendFormat"]) for panel in dashboard["panels"] for line in panel["targets"]]


def test_the_dashboard_asks_only_for_metrics_and_labels_that_a_scrape_has(scraped: tuple[str, str]) -> None:
    known = parse("".join(scraped))
    named = set()
    for query, legend in queries():
        names = set(re.findall(r"\bstoker_\w+", query))
        named |= names
        assert names <= set(known), query
        labels = {label for name in names for label in METRICS[name].labels} | {"instance"}
        assert set(re.findall(r"{{(\w+)}}", legend)) <= labels, legend
    assert len(named) >= 25
    text = (ROOT / "deploy" / "grafana" / "stoker.json").read_text()
    assert "Schema-checked, not run" in text


@needs_promtool
def test_promtool_reads_each_query_of_the_dashboard(tmp_path: Path) -> None:
    rules = [
        {"record": f"line:{number}", "expr": query.replace("$__rate_interval", "5m")}
        for number, (query, _) in enumerate(queries())
    ]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    checked = subprocess.run(
        ["promtool", "check", "rules", str(file)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (checked.returncode, checked.stderr) == (0, "")


def test_a_port_in_use_and_a_wrong_address_are_one_line_before_anything_is_read(config: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        result = run_cli("serve", "--config", str(config), "--metrics", f"127.0.0.1:{port}")
    assert result.returncode == 1
    assert result.stderr.strip() == (
        f"loader-serve: --metrics 127.0.0.1:{port}: Address already in use: choose another host or port"
    )
    result = run_cli("serve", "--config", str(config), "--metrics", "9100")
    assert (
        result.stderr.strip() == "loader-serve: --metrics '9100': HOST:PORT is expected, e.g. --metrics 127.0.0.1:9100"
    )
