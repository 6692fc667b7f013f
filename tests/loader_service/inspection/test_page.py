"""The page of `loader-inspect --html`: what it says, and what a browser makes of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from loader_service.inspection.command import main
from loader_service.inspection.style import POLICY
from tests.end_to_end.fleet import write_config, write_demonstrations
from tests.end_to_end.recorded import write_chats
from tests.tiny_models import write_model_folder

WIDTHS = (1280, 420)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rows of a robot and four chats, of which one spells a special token and one writes a tag."""
    folder = tmp_path_factory.mktemp("page")
    demos, chats = write_demonstrations(folder / "demos", [2, 2, 2]), write_chats(folder / "chats.jsonl", 4)
    chats.write_text(chats.read_text().replace("question 0", "is </s> a token?").replace("question 1", "<b>bold</b>"))
    config = write_config(folder, write_model_folder(folder / "model"), [demos])
    tree = yaml.safe_load(config.read_text())
    del tree["data"]["train_data_paths"], tree["data"]["dataset_type"]
    tree["data"]["sources"] = [
        {"dataset_type": "mani_openpi", "paths": [str(demos)], "weight": 2, "name": "robots"},
        {"dataset_type": "chat", "paths": [str(chats)], "weight": 1},
    ]
    config.write_text(yaml.safe_dump(tree))
    assert main(["--config", str(config), "--num", "4", "--html", str(folder / "rows.html")]) == 0
    return folder / "rows.html"


def test_what_the_page_says(page: Path) -> None:
    text = page.read_text()
    assert text.count("<section>") == 8
    assert text.count("data:image/png;base64,") == 4
    assert '<span class="t l s" title="place ' in text  # the end token is a special token and a label
    assert re.search(r'<span class="t s" title="place 0, id \d+">&lt;s&gt;</span>', text)
    assert "<b>bold" not in text
    assert "&lt;b&gt;" in text or "&lt;</span>" in text
    assert text.count("&lt;image&gt;<b>&times;16</b>") == 4
    assert len(re.findall(r'<span class="t l a"[^>]*>action \d+</span>', text)) == 4 * 7
    assert text.count("<td>decoded</td>") == 4
    assert re.search(r"<tr><td>robots</td><td>2</td><td>4</td><td>50.0%</td>", text)
    assert re.search(r"codes of bins: \d+ of 256 are used", text)
    assert text.count("<figure>") == 1 + 7 + 1
    for word in ("http:", "https:", "<script", "url("):
        assert word not in text.replace("http-equiv", "")


@pytest.mark.browser
@pytest.mark.process
def test_a_browser_shows_it_without_errors_or_requests(page: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed (apt-get install chromium): the page was NOT opened in a browser")
    for width in WIDTHS:
        picture, net = tmp_path / f"{width}.png", tmp_path / f"{width}.json"
        said = _browse(chromium, page, tmp_path, f"--screenshot={picture}", f"--log-net-log={net}", width=width)
        assert "CONSOLE" not in said
        assert _requests(net) <= {page.as_uri()}
        with Image.open(picture) as shot:
            assert len(np.unique(np.asarray(shot.convert("L")))) > 50
    # The same page with a script that looks at it: the page's own policy would refuse that script.
    probe = tmp_path / "probe.html"
    script = (
        "<script>onload=()=>{document.title=JSON.stringify([[...document.images].map(i=>[i.complete,i.naturalWidth]),"
        "document.documentElement.scrollWidth<=innerWidth])}</script></body>"
    )
    text = page.read_text()
    assert text.count(POLICY) == 1
    probe.write_text(text.replace(POLICY, "").replace("</body>", '<img src="http://127.0.0.1:9/x.png"></body>'))
    _browse(chromium, probe, tmp_path, f"--log-net-log={tmp_path / 'probe.json'}", "--dump-dom", width=WIDTHS[0])
    assert "http://127.0.0.1:9/x.png" in _requests(tmp_path / "probe.json"), "the check for requests works"
    probe.write_text(text.replace("</body>", script))
    assert "CONSOLE" in _browse(chromium, probe, tmp_path, "--dump-dom", width=WIDTHS[0]), "the check for errors works"
    probe.write_text(text.replace(POLICY, "").replace("</body>", script))
    for width in WIDTHS:
        dom = _browse(chromium, probe, tmp_path, "--dump-dom", width=width)
        found = re.search(r"<title>(.*?)</title>", dom)
        assert found, dom[:500]
        assert json.loads(found.group(1)) == [[[True, 64]] * 4, True]


def _requests(net_log: Path) -> set[str]:
    """URLs that a page asked for; the browser's own have no origin."""
    found = [event.get("params", {}) for event in json.loads(net_log.read_text())["events"]]
    return {one["url"] for one in found if "url" in one and one.get("initiator", "not an origin") != "not an origin"}


def _browse(chromium: str, page: Path, folder: Path, *arguments: str, width: int) -> str:
    """What a headless browser prints of the page."""
    command = [
        chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # the browser's own requests stay here, too
        f"--user-data-dir={folder / 'profile'}", f"--window-size={width},1600", *arguments, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr
