"""G10 on live ports: bytes that no honest rank sends give protocol errors and nothing else, with keys and without.

Mutated golden frames and frames made by hypothesis go through a real DEALER; what is no ZMTP goes through a plain socket.
"""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgpack
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stoker_proto import PROTOCOL_VERSION
from stoker_proto.wire import encoding
from stoker_proto.wire.keys import Key, read_public, read_secret
from stoker_proto.wire.messages import Hello, Piece, Ping, Pong, Ticket, Welcome
from tests.end_to_end.faults.conftest import Arena
from tests.end_to_end.faults.crew import Crew, num_fds, rss_bytes
from tests.end_to_end.faults.zmtp import GREETING, garbage
from tests.end_to_end.fleet import ROOT, pull, run_cli, wait_until

MIB = 1 << 20
MOST_OF_A_HANDSHAKE = 100
"""Bytes that the loader may say after its greeting: a READY is about 50, what comes after costs more."""
MOST_PLANS = 8
"""Plans that a loader of one entry maps at the same time; each is two files."""
GOLDEN = {path.stem: path.read_bytes() for path in sorted((ROOT / "proto" / "golden").glob("*.bin"))}
HELLO = encoding.encode(Hello(protocol=PROTOCOL_VERSION, client="c", rank=0, world_size=1, fingerprints={}))
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9)
)
BODIES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
)


@dataclass(frozen=True)
class Target:
    """A loader with or without keys, and what an admitted rank needs."""

    crew: Crew
    overrides: tuple[str, ...]
    keys: tuple[Key, Key] | None


@pytest.fixture(scope="module", params=["in the clear", "with keys"])
def target(request: pytest.FixtureRequest, arena: Arena, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    if request.param == "in the clear":
        with Crew(arena.config, 1) as crew:
            yield Target(crew, (), None)
        return
    folder = tmp_path_factory.mktemp("keys") / "keys"
    for name in ("loader", "rank"):
        assert run_cli("keys", "--out", str(folder), "--name", name).returncode == 0
    security = f"loader_secret={folder}/loader.key_secret", f"allowed_ranks=[{folder}/rank.key]"
    overrides = f"loader_key={folder}/loader.key", f"rank_secret={folder}/rank.key_secret"
    with Crew(arena.config, 1, *[f"--set=cluster.security.{value}" for value in security]) as crew:
        keys = load_keys(folder)
        yield Target(crew, tuple(f"cluster.security.{value}" for value in overrides), keys)


def load_keys(folder: Path) -> tuple[Key, Key]:
    """The rank's secret and the loader's public key."""
    return read_secret(folder / "rank.key_secret"), read_public(folder / "loader.key")


class Dealer:
    """An admitted rank that sends what it likes."""

    def __init__(self, target: Target) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        if target.keys:
            secret, loader = target.keys
            self.socket.curve_secretkey, self.socket.curve_publickey = secret.value, zmq.curve_public(secret.value)
            self.socket.curve_serverkey = loader.value
        self.socket.connect(target.crew.addresses[0])
        self.nonce = 1 << 40
        self.socket.send(HELLO)
        assert self.socket.poll(60_000)
        assert isinstance(encoding.decode(self.socket.recv()), Welcome)

    def send_all(self, frames: list[bytes]) -> dict[str, float]:
        """The loader's counters after it has dealt with them all."""
        for frame in frames:
            self.socket.send(frame)
        self.nonce += 1
        self.socket.send(HELLO)  # a mutant of it may have been refused
        self.socket.send(encoding.encode(Ping(nonce=self.nonce)))
        while True:  # some mutants are honest questions: their answers come before
            assert self.socket.poll(60_000), "the loader does not answer any more"
            answer = encoding.decode(self.socket.recv())
            if isinstance(answer, Pong) and answer.nonce == self.nonce:
                return answer.progress

    def ask(self, ticket: Ticket) -> int:
        """The number of the piece that answers a ticket."""
        self.socket.send(encoding.encode(ticket))
        assert self.socket.poll(60_000), "the loader does not answer any more"
        answer = encoding.decode(self.socket.recv())
        assert isinstance(answer, Piece), answer
        return answer.ticket

    def close(self) -> None:
        self.socket.close(0)
        self.context.term()


@pytest.fixture
def dealer(target: Target) -> Iterator[Dealer]:
    dealer = Dealer(target)
    yield dealer
    dealer.close()


@contextlib.contextmanager
def nothing_grows(target: Target, arena: Arena) -> Iterator[None]:
    """Memory and descriptors afterwards are those of before; the run is served as before.

    A mutant may be an honest ticket of another epoch. Its plan stays mapped, as one of a bounded number.
    """
    pid = target.crew.pid(0)
    assert pull(arena.config, target.crew.addresses, *target.overrides).steps == arena.expected.steps
    rss, fds = rss_bytes(pid), num_fds(pid) - len(plan_files(pid))
    yield
    wait_until(lambda: num_fds(pid) - len(plan_files(pid)) <= fds + 1, 120, "closing what was opened")
    assert len(plan_files(pid)) <= 2 * MOST_PLANS
    assert pull(arena.config, target.crew.addresses, *target.overrides).steps == arena.expected.steps
    assert rss_bytes(pid) - rss < 16 * MIB


def plan_files(pid: int) -> list[Path]:
    """Files of epoch plans that the process has mapped, also of those that were removed since."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.append(Path(link.readlink()))
    return [path for path in found if path.name.startswith("plan-")]


def mutate(chance: random.Random, frame: bytes) -> bytes:
    """One to four bytes changed, cut out, doubled or added."""
    data = bytearray(frame)
    for _ in range(chance.randrange(1, 5)):
        at = chance.randrange(len(data) + 1)
        kind = chance.randrange(4)
        if kind == 0 and at < len(data):
            data[at] = chance.randrange(256)
        elif kind == 1:
            del data[at : at + chance.randrange(1, 9)]
        elif kind == 2:
            data[at:at] = data[at : at + chance.randrange(1, 9)]
        else:
            data[at:at] = chance.randbytes(chance.randrange(1, 9))
    return bytes(data)


def test_mutated_golden_frames(target: Target, arena: Arena, dealer: Dealer) -> None:
    chance = random.Random(7)
    with nothing_grows(target, arena):
        before = dealer.send_all([])["rejected"]
        frames = [mutate(chance, chance.choice(list(GOLDEN.values()))) for _ in range(2000)]
        for start in range(0, len(frames), 100):
            progress = dealer.send_all(frames[start : start + 100])
        assert progress["rejected"] - before > 1000


def test_honest_tickets_of_many_epochs(target: Target, arena: Arena, dealer: Dealer) -> None:
    """Each needs a plan of its own: the loader maps some of them only, and keeps the files of some only."""
    pid = target.crew.pid(0)
    with nothing_grows(target, arena):
        for epoch in range(100, 140):
            assert dealer.ask(Ticket(ticket=epoch, split="train", epoch=epoch, lane=0, start=0, count=1)) == epoch
        assert len(plan_files(pid)) == 2 * MOST_PLANS
    assert len(list(plan_files(pid)[0].parent.glob("plan-train-*-ends.npy"))) <= MOST_PLANS


def test_golden_frames_that_are_for_ranks(target: Target, dealer: Dealer) -> None:
    """Whole and honest, in the wrong direction."""
    before = dealer.send_all([])["rejected"]
    wrong = [GOLDEN[name] for name in ("welcome", "refuse", "lanes", "piece", "failure", "pong", "drain")]
    assert dealer.send_all(wrong)["rejected"] == before + len(wrong)


def test_frames_made_by_hypothesis(target: Target, arena: Arena, dealer: Dealer) -> None:
    kinds = st.sampled_from(sorted(encoding.KINDS)) | st.binary(max_size=2)
    frames = st.builds(lambda kind, body: kind + msgpack.packb(body), kinds, BODIES) | st.binary(max_size=60)

    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(frames.filter(len), min_size=1, max_size=20))
    def send(batch: list[bytes]) -> None:
        before = dealer.send_all([])["rejected"]
        assert dealer.send_all(batch)["rejected"] == before + len(batch)

    with nothing_grows(target, arena):
        send()


def test_bytes_that_are_no_zmtp(target: Target, arena: Arena) -> None:
    """They learn no more than a handshake says, and the loader hangs up when they do."""
    chance = random.Random(11)
    host, port = target.crew.addresses[0].removeprefix("tcp://").split(":")

    def send(stranger: tuple[bytes, bool]) -> None:
        content, leaves = stranger
        with socket.create_connection((host, int(port)), 60) as peer:
            said = b""
            with contextlib.suppress(ConnectionError):  # it hung up before all was sent
                peer.sendall(content)
            if leaves:
                return  # without a word
            with contextlib.suppress(OSError):  # it hung up
                peer.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while more := peer.recv(4096):
                    said += more
            assert said[:1] in (b"", GREETING[:1])
            assert len(said) <= len(GREETING) + MOST_OF_A_HANDSHAKE

    strangers = [(garbage(chance), chance.random() < 0.5) for _ in range(120)]
    with nothing_grows(target, arena), ThreadPoolExecutor(12) as pool:  # for some it waits 10 s to say more
        list(pool.map(send, strangers))
