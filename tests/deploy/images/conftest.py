"""Both images, built once for these tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.deploy.images.buildah import ROOT, Buildah, problem
from tests.deploy.test_containers import resolved


@pytest.fixture(scope="session")
def buildah() -> Buildah:
    """With the images of all services of compose.yaml, under the names that it gives them."""
    folder = Path(os.environ.get("STOKER_IMAGES") or ROOT / "build" / "images")
    if (reason := problem(folder)) is not None:
        pytest.skip(f"images are NOT built and NOT run: {reason}")
    buildah = Buildah(folder)
    buildah.make_base()
    variable = {name: os.environ[name] for name in ("PIP_EXTRA_INDEX_URL",) if name in os.environ}
    services = resolved("cpu", **variable)["services"]
    builds = {tree["image"]: tree["build"] for tree in services.values()}
    assert set(builds) == {"stoker-loader", "stoker-trainer"}
    for tag, build in builds.items():
        assert Path(build["context"]) == ROOT
        buildah.build(build["dockerfile"], tag, build.get("args") or {})
    return buildah
