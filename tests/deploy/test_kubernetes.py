"""deploy/kubernetes: against the schemas of Kubernetes, and the arguments in it against the programs' own command lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import launch
from loader_service.server.command import parse_arguments
from stoker_proto.config.cluster import parse_dns_entry

FOLDER = Path(__file__).parent.parent.parent / "deploy" / "kubernetes"
VERSION = "1.30"


def documents() -> dict[tuple[str, str], Any]:
    """(kind, name) -> document."""
    found = [one for path in sorted(FOLDER.glob("*.yaml")) for one in yaml.safe_load_all(path.read_text())]
    return {(one["kind"], one["metadata"]["name"]): one for one in found}


def validate(document: Any) -> None:
    module = pytest.importorskip(
        "kubernetes_validate",
        reason="NOT TESTED: deploy/kubernetes against the schemas; pip install kubernetes-validate",
    )
    module.validate(document, VERSION, strict=True)


def test_kubernetes_accepts_every_document_and_would_notice_a_mistyped_key() -> None:
    found = documents()
    assert sorted(found) == [
        ("Deployment", "stoker-loaders"),
        ("Job", "stoker-trainer"),
        ("PodDisruptionBudget", "stoker-loaders"),
        ("Service", "stoker-loaders"),
        ("Service", "stoker-trainer"),
    ]
    for document in found.values():
        validate(document)
    wrong = found["Deployment", "stoker-loaders"]
    wrong["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(Exception, match="readynessProbe"):
        validate(wrong)


def container(kind: str, name: str) -> Any:
    (one,) = documents()[kind, name]["spec"]["template"]["spec"]["containers"]
    return one


def test_the_loader_s_ports_are_those_of_its_service_and_its_probes() -> None:
    loader = container("Deployment", "stoker-loaders")
    options = parse_arguments(list(loader["args"]))
    ports = {port["name"]: port["containerPort"] for port in loader["ports"]}
    assert options.bind == f"tcp://0.0.0.0:{ports['pieces']}" == "tcp://0.0.0.0:5555"
    assert options.health == f"0.0.0.0:{ports['health']}"
    assert loader["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "health"}


def test_selectors_find_the_pods() -> None:
    found = documents()
    labels = {
        kind: found[kind, name]["spec"]["template"]["metadata"]["labels"]
        for kind, name in (("Deployment", "stoker-loaders"), ("Job", "stoker-trainer"))
    }
    assert found["Service", "stoker-loaders"]["spec"]["selector"] == labels["Deployment"]
    assert found["PodDisruptionBudget", "stoker-loaders"]["spec"]["selector"]["matchLabels"] == labels["Deployment"]
    assert found["Service", "stoker-trainer"]["spec"]["selector"] == labels["Job"]


def test_the_trainer_s_pods_are_the_nodes_of_a_run() -> None:
    job = documents()["Job", "stoker-trainer"]["spec"]
    trainer = container("Job", "stoker-trainer")
    for index in range(job["completions"]):
        arguments = [text.replace("$(JOB_COMPLETION_INDEX)", str(index)) for text in trainer["args"]]
        options = launch.parse_arguments(arguments)
        assert "cluster.num_nodes=2" in options.set
        membership = launch.find_membership(options, {}, 2)
        assert membership is not None
        assert (membership.node, membership.num_nodes) == (index, job["parallelism"])
        assert membership.master == "stoker-trainer-0.stoker-trainer", "POD.SUBDOMAIN"
        assert options.no_loaders
    assert job["template"]["spec"]["subdomain"] == "stoker-trainer"
    addresses = next(one for one in trainer["args"] if one.startswith("cluster.loader_addresses="))
    (entry,) = yaml.safe_load(addresses.partition("=")[2])
    assert parse_dns_entry(entry) == ("stoker-loaders", 5555)
