"""Real sockets on the loopback: openpi's own client, health, limits, keys; and the command with an exported model."""

from __future__ import annotations

import asyncio
import http.client
import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.sync.client import connect

from tests.trainer.models.test_robot import MEASURED, SIZES, processor_of
from tests.trainer.serving.test_session import FRAME, METADATA, Recorder, openpi
from tests.trainer.sim.test_evaluate_cli import save_export
from tests.trainer.support.memory import make_config, make_processor
from trainer.models.families import family_of, read_model_config
from trainer.models.tiny import build_tiny
from trainer.policy import Policy
from trainer.policy_io import PolicyInput, Prediction
from trainer.serving.command import describe, main
from trainer.serving.observations import ObservationReader
from trainer.serving.server import Limits, PolicyServer
from trainer.serving.session import Session

REPOSITORY = Path(__file__).resolve().parents[3]
DEADLINE_S = 240
HAS_OPENPI = importlib.util.find_spec("openpi_client") is not None
OBSERVATION = {"observation/image": FRAME, "prompt": "push the cube"}
needs_openpi = pytest.mark.skipif(
    not HAS_OPENPI, reason="OPENPI'S CLIENT NOT TESTED: pip install --no-deps -c deploy/constraints.txt openpi-client"
)

theirs = pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager:DeprecationWarning")
"""openpi's client calls websockets as its older versions want it."""


class Slow(Recorder):
    """Waits in each prediction until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.began, self.let_go = threading.Event(), threading.Event()

    def predict(self, inputs: Sequence[PolicyInput]) -> list[Prediction]:
        self.began.set()
        assert self.let_go.wait(DEADLINE_S)
        return super().predict(inputs)


class Broken(Recorder):
    def predict(self, inputs: Sequence[PolicyInput]) -> list[Prediction]:
        raise ZeroDivisionError("/a/path/of/the/server")


@contextmanager
def serving(
    policy: Recorder | Policy, read: ObservationReader | None = None, metadata: Any = METADATA, **limits: Any
) -> Iterator[int]:
    """The port of a server in a thread."""
    server = PolicyServer(lambda: Session(policy, read or ObservationReader(), metadata, None), Limits(**limits))
    ports: list[int] = []
    ready, loop, stopped = threading.Event(), asyncio.new_event_loop(), asyncio.Event()

    async def run() -> None:
        async with server.listening("127.0.0.1", 0) as port:
            ports.append(port)
            ready.set()
            await stopped.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    try:
        assert ready.wait(DEADLINE_S)
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
        loop.close()


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


@needs_openpi
@theirs
def test_openpis_own_client() -> None:
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    policy = Recorder()
    with serving(policy) as port:
        client = WebsocketClientPolicy("127.0.0.1", port)
        try:
            assert client.get_server_metadata()["num_images"] == [1, 1]
            answer = client.infer(OBSERVATION)
            assert answer["actions"].tolist() == [[0, 0.5], [1, 0.5], [2, 0.5]]
            assert answer["actions"].dtype == np.float32
            assert answer["server_timing"]["infer_ms"] >= 0
            with pytest.raises(RuntimeError, match="Error in inference server:\nits weights are damaged"):
                client.infer(OBSERVATION | {"prompt": "nan"})
        finally:
            client._ws.close()
    np.testing.assert_array_equal(policy.inputs[0].images[0], FRAME)


@pytest.mark.long
@needs_openpi
@theirs
def test_openpis_client_sends_state_and_measurements(tmp_path: Path) -> None:
    """To a model with pictures around the hand: the same actions as from `Policy.act`, and the same pictures."""
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    folder = tmp_path / "robot"
    build_tiny("robot", folder, image_size=16, robot=SIZES)
    family = family_of(read_model_config(str(folder)))
    policy = Policy(family.auto_class.from_pretrained(folder), processor_of(folder, tmp_path), family)
    seen: list[np.ndarray[Any, Any]] = []
    policy.model.register_forward_pre_hook(
        lambda _, __, told: seen.append(told["pixel_values"].numpy()) if "pixel_values" in told else None,
        with_kwargs=True,
    )
    frame = np.random.default_rng(0).integers(0, 256, (24, 24, 3)).astype(np.uint8)
    state = np.array([0.5, -0.5, 0.1], np.float32)
    expected = policy.act(frame, "push", measurements={"state": state, **MEASURED})
    np.testing.assert_array_equal(expected, policy.act(frame, "push", state, MEASURED))
    moved = MEASURED | {"tcp_pose": np.array([-0.3, 0.0, 0.0, 1, 0, 0, 0], np.float32)}
    policy.act(frame, "push", state, moved)
    told = {f"observation/{name}": value for name, value in {"state": state, **MEASURED}.items()}
    told["observation/intrinsic_cv"] = told["observation/intrinsic_cv"].reshape(-1)  # flat numbers are arranged
    with serving(policy, ObservationReader.of(policy.processor), describe(policy, folder, 1, ())) as port:
        client = WebsocketClientPolicy("127.0.0.1", port)
        try:
            assert client.get_server_metadata()["measurements"] == {
                "tcp_pose": [7],
                "intrinsic_cv": [3, 3],
                "extrinsic_cv": [3, 4],
            }
            answer = client.infer({"observation/image": frame, "prompt": "push", **told})
            np.testing.assert_array_equal(answer["actions"], expected)
            del told["observation/tcp_pose"]
            with pytest.raises(RuntimeError, match=r"no tcp_pose float32\[7\].*observation/tcp_pose"):
                client.infer({"observation/image": frame, "prompt": "push", **told})
        finally:
            client._ws.close()
    first, again, elsewhere, served = seen
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, served)
    assert (first[0] == elsewhere[0]).all()
    assert (first[1] != elsewhere[1]).any(), "the second picture is cut around the hand"


@needs_openpi
@theirs
def test_openpis_client_with_a_key() -> None:
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    with serving(Recorder(), api_key="0123456789abcdef") as port:
        client = WebsocketClientPolicy("127.0.0.1", port, api_key="0123456789abcdef")
        client._ws.close()
        with pytest.raises(InvalidStatus, match="401"):
            WebsocketClientPolicy("127.0.0.1", port, api_key="0123456789abcdeX")
        assert get(port, "/healthz") == (200, "OK\n"), "health has no secrets"


def test_health_answers_while_the_model_computes_and_two_clients_take_turns() -> None:
    policy = Slow()
    with serving(policy, connections=2) as port, connect(f"ws://127.0.0.1:{port}") as first:
        first.recv(DEADLINE_S)
        first.send(openpi(OBSERVATION))
        assert policy.began.wait(DEADLINE_S)
        assert get(port, "/healthz") == (200, "OK\n")
        assert get(port, "/health") == (200, '{"status": "ok"}\n')
        with connect(f"ws://127.0.0.1:{port}") as second:
            second.recv(DEADLINE_S)
            second.send(openpi(OBSERVATION))
            with pytest.raises(InvalidStatus, match="503"):
                connect(f"ws://127.0.0.1:{port}").close()
            policy.let_go.set()
            answers = [msgpack.unpackb(client.recv(DEADLINE_S)) for client in (first, second)]
    assert [len(answer["actions"][b"data"]) for answer in answers] == [24, 24]


def test_a_message_beyond_the_limit_ends_the_connection_of_that_client_only() -> None:
    with serving(Recorder(), message_bytes=10_000) as port:
        with connect(f"ws://127.0.0.1:{port}") as client:
            client.recv(DEADLINE_S)
            client.send(bytes(10_001))
            with pytest.raises(ConnectionClosedError) as caught:
                client.recv(DEADLINE_S)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1009  # message too big
        with connect(f"ws://127.0.0.1:{port}") as client:
            client.recv(DEADLINE_S)
            client.send(openpi(OBSERVATION))
            assert b"actions" in client.recv(DEADLINE_S)


def test_a_web_page_is_refused() -> None:
    with serving(Recorder()) as port, pytest.raises(InvalidStatus, match="403"):
        connect(f"ws://127.0.0.1:{port}", origin="http://127.0.0.1").close()


def test_a_defect_ends_one_connection_and_tells_no_secrets(caplog: pytest.LogCaptureFixture) -> None:
    with serving(Broken()) as port, connect(f"ws://127.0.0.1:{port}") as client:
        client.recv(DEADLINE_S)
        client.send(openpi(OBSERVATION))
        assert client.recv(DEADLINE_S) == "the server failed (ZeroDivisionError); its log has the reason"
        with pytest.raises(ConnectionClosedError) as caught:
            client.recv(DEADLINE_S)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1011
        assert get(port, "/healthz")[0] == 200
    assert "/a/path/of/the/server" in caplog.text


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_the_command_serves_an_export_until_a_signal(number: int, tiny_llava: Path, tmp_path: Path) -> None:
    export = save_export(
        tmp_path / "export", tiny_llava, make_processor(make_config(tiny_llava, tmp_path)).with_num_images((1, 1))
    )
    server = subprocess.Popen(
        [sys.executable, "-m", "trainer.serving.command", "--model", export, "--bind", "127.0.0.1:0", "--threads", "1"],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "proto")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        found = re.fullmatch(rf"serving {re.escape(str(export))} at (ws://127\.0\.0\.1:\d+)\n", line)
        assert found, (line, server.communicate())
        with connect(found[1]) as client:
            metadata = msgpack.unpackb(client.recv(DEADLINE_S))
            assert (metadata["model"], metadata["action_dim"], metadata["action_horizon"]) == ("export", 3, 1)
            client.send(openpi({"image": np.zeros((64, 64, 3), np.uint8), "prompt": "push"}))
            assert msgpack.unpackb(client.recv(DEADLINE_S))["actions"][b"shape"] == [1, 3]
            client.send(openpi({"prompt": "push"}))
            assert "0 images: the samples that this model learned actions from have 1" in str(client.recv(DEADLINE_S))
        with connect(found[1]) as client:
            client.recv(DEADLINE_S)
            server.send_signal(number)
            with pytest.raises(Exception, match="1001"):  # going away
                client.recv(DEADLINE_S)
        _, errors = server.communicate(timeout=DEADLINE_S)
    finally:
        if server.poll() is None:
            server.kill()
            server.communicate()
    assert server.returncode == 0
    assert "Traceback" not in errors


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bind", "0.0.0.0:8000"], "anybody there could use the model: give --api-key-file, or bind 127.0.0.1"),
        (["--bind", "robot:8000"], "can be reached from other machines"),
        (["--bind", "8000"], "HOST:PORT is expected, such as 127.0.0.1:8000"),
        (["--bind", "::1:8000"], "HOST:PORT is expected"),
        (["--bind", "127.0.0.1:70000"], "HOST:PORT is expected"),
        (["--api-key-file", "KEY"], "a key of at least 16 letters and digits in one line is expected"),
        (["--api-key-file", "absent"], "it cannot be read"),
        ([], "there is no stoker_processor.json"),
    ],
)  # fmt: skip
def test_what_the_command_refuses(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_text("short\n")
    given = [str(tmp_path / "key") if argument == "KEY" else argument for argument in arguments]
    assert main(["--model", str(tmp_path), *given]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("stoker-policy: ")
    assert message in line


def test_a_missing_library_names_the_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "websockets.asyncio.server", None)
    assert main(["--model", str(tmp_path)]) == 1
    assert "pip install 'stoker[serve]'" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for needed in ("openpi", "vla-eval", "outside_mass", "SSH tunnel", "/healthz", "examples:"):
        assert needed in text
