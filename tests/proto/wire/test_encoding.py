"""Message <-> bytes: round trips of anything, and RemoteProtocolError for everything that is no message."""

from __future__ import annotations

import dataclasses
import resource
import tracemalloc

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker_proto.errors import LocalProtocolError, RemoteProtocolError
from stoker_proto.wire import encoding
from stoker_proto.wire.messages import Epoch, Failure, Hello, Lanes, Message, Piece, Pong, Shards, Ticket, piece_payload
from stoker_proto.wire.peer_text import plain, shown
from tests.proto.wire.make_golden import MESSAGES

INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
LANES = st.dictionaries(INT64, st.lists(INT64, max_size=3), max_size=3)
TEXT = st.text(max_size=20)


@st.composite
def pieces(draw: st.DrawFn) -> Piece:
    lengths = draw(st.lists(st.integers(0, 5), max_size=4))
    counts = draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    chunk, dim = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    width = draw(st.integers(0, 3)) if lengths else 0
    row_samples = [len(lengths) - 1, 1] if len(lengths) > 1 and draw(st.booleans()) else []
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return Piece(
        ticket=draw(INT64),
        loader=draw(TEXT),
        keys=rng.integers(0, 1 << 60, (len(lengths), 3)),
        lengths=np.array(lengths, np.int32),
        input_ids=rng.integers(0, 1 << 31, sum(lengths)).astype(np.int32),
        supervised=rng.integers(0, 2, sum(lengths)).astype(np.uint8),
        image_counts=np.array(counts, np.uint8),
        images=[rng.bytes(9) for _ in range(sum(counts))],
        actions=rng.normal(size=(len(lengths), chunk, dim)).astype(np.float32),
        skipped=draw(st.dictionaries(st.integers(0, 3), TEXT, max_size=2)),
        row_samples=np.array(row_samples, np.uint16),
        auxiliary=rng.normal(size=(len(lengths) if width else 0, width)).astype(np.float32),
    )


@pytest.mark.long
@settings(deadline=None)
@given(piece=pieces())
def test_pieces_round_trip(piece: Piece) -> None:
    back = encoding.decode(encoding.encode(piece))
    assert isinstance(back, Piece)
    assert piece_payload(back) == piece_payload(piece)
    assert back.num_rows == (len(piece.row_samples) or len(piece.lengths))
    assert (back.ticket, back.loader, back.skipped) == (piece.ticket, piece.loader, piece.skipped)
    for name in ("keys", "lengths", "input_ids", "supervised", "image_counts", "actions", "row_samples", "auxiliary"):
        sent, received = getattr(piece, name), getattr(back, name)
        assert (received.dtype, received.shape) == (sent.dtype, sent.shape)


@pytest.mark.long
@settings(deadline=None)
@given(
    message=st.one_of(
        st.builds(
            Ticket,
            ticket=INT64,
            split=TEXT,
            epoch=INT64,
            lane=INT64,
            start=INT64,
            count=INT64,
            rows=st.binary(max_size=256),
        ),
        st.builds(Shards, ticket=INT64, loader=TEXT, shards=st.lists(INT64)),
        st.builds(Failure, ticket=INT64, reason=TEXT, message=TEXT),
        st.builds(Pong, nonce=INT64, progress=st.dictionaries(TEXT, st.floats(allow_nan=False))),
        st.builds(Lanes, split=TEXT, epoch=INT64, lengths=LANES, starts=LANES, tokens=st.dictionaries(INT64, INT64)),
        st.builds(Epoch, split=TEXT, epoch=INT64, entries=st.lists(INT64)),
        st.builds(
            Hello, protocol=INT64, client=TEXT, rank=INT64, world_size=INT64, fingerprints=st.dictionaries(TEXT, TEXT)
        ),
    )
)
def test_other_messages_round_trip(message: Message) -> None:
    assert encoding.decode(encoding.encode(message)) == message
    assert encoding.decode(memoryview(encoding.encode(message))) == message


def test_big_endian_and_strided_arrays_travel_as_they_mean() -> None:
    piece = MESSAGES["piece"]
    assert isinstance(piece, Piece)
    odd = dataclasses.replace(piece, keys=np.asfortranarray(piece.keys.astype(">i8")))
    assert encoding.encode(odd) == encoding.encode(piece)


@settings(max_examples=300, deadline=None)
@given(frame=st.binary(max_size=80))
def test_no_bytes_do_anything_but_raise_a_protocol_error(frame: bytes) -> None:
    try:
        message = encoding.decode(frame)
    except RemoteProtocolError:
        return
    assert type(message) in encoding.KINDS.values()


@pytest.mark.long
@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(MESSAGES)),
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
)
def test_damaged_frames_raise_a_protocol_error_or_are_messages(name: str, edits: list[tuple[int, int]]) -> None:
    frame = bytearray(encoding.encode(MESSAGES[name]))
    for position, value in edits:
        frame[position % len(frame)] = value
    try:
        message = encoding.decode(bytes(frame))
    except RemoteProtocolError:
        return
    assert type(message) in encoding.KINDS.values()


@pytest.mark.long
@settings(max_examples=300, deadline=None)
@given(piece=pieces(), edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4))
def test_a_large_piece_is_read_as_a_small_one_but_its_images_are_views(
    piece: Piece, edits: list[tuple[int, int]]
) -> None:
    frame = bytearray(encoding.encode(piece))
    for position, value in edits:
        frame[1 + position % (len(frame) - 1)] = value
    read = []
    for large in (0, 1 << 30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encoding, "_LARGE_BYTES", large)
            try:
                read.append(encoding.decode(bytes(frame)))
            except RemoteProtocolError:
                read.append(None)
    views, copies = read
    if isinstance(copies, Piece) and isinstance(views, Piece):
        assert piece_payload(views) == piece_payload(copies)
        if not edits and piece.ticket >= 0:
            assert {type(image) for image in views.images} <= {memoryview}
        assert {type(image) for image in copies.images} <= {bytes}
    else:
        assert views is copies is None


def test_images_named_twice_and_too_many_images_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_LARGE_BYTES", 0)
    fields = ["ticket", 7, "images", [b"ab"], "images", [b"cd"]]
    frame = b"P\x83" + b"".join(map(msgpack.packb, fields))
    with pytest.raises(RemoteProtocolError, match="a Piece frame has a repeated field images"):
        encoding.decode(frame)
    many = b"\x81\xa6images\xdd" + (1 << 24).to_bytes(4, "big") + b"\xc4\0" * (1 << 24)
    tracemalloc.start()
    with pytest.raises(RemoteProtocolError, match="a Piece frame is not msgpack"):
        encoding.decode(memoryview(b"P" + many))
    assert tracemalloc.get_traced_memory()[1] < 200 << 20
    tracemalloc.stop()


TICKET = {"ticket": 7, "split": "train", "epoch": 0, "lane": 3, "start": 16, "count": 8, "rows": b""}


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (b"", "0 bytes"),
        (b"T", "1 bytes"),
        (b"Z\x80", "kind b'Z'"),
        (b"L\x90", "holds a list"),
        (b"T" + msgpack.packb({**TICKET, "lane": None}), "Ticket.lane is None: int is expected"),
        (b"T" + msgpack.packb({**TICKET, "lane": True}), "Ticket.lane is True"),
        (b"T" + msgpack.packb({**TICKET, "lane": 1 << 63}), "Ticket.lane"),
        (b"T" + msgpack.packb({**TICKET, "more": 1}), "a Ticket frame has 8 fields: 7 are expected"),
        (
            b"L" + msgpack.packb({"more\n": 1}),
            "unknown fields: 'epoch', 'lengths', 'more\\n', 'split', 'starts', 'tokens'",
        ),
        (b"T" + msgpack.packb({"ticket": 7}), "a Ticket frame has 1 fields: 7 are expected"),
        (b"I" + msgpack.packb({"nunce": 7}), "a Ping frame has an unknown or repeated field 'nunce'"),
        (b"T" + msgpack.packb(TICKET) + b"\x00", "goes on for 1 bytes after its map"),
        (b"W\x80\x00", "not msgpack: ExtraData"),
        (b"T" + msgpack.packb(TICKET)[:-1], "not msgpack"),
        (b"L\x81\x90\x01", "not msgpack: TypeError"),
        (b"I\x81\xa1\xff\x01", "not msgpack: UnicodeDecodeError"),
        (b"L" + b"\x91" * 5000, "not msgpack: StackError"),
        (b"T\xd6\xff\x00\x00\x00\x00", "not msgpack"),  # a timestamp
        (b"I\x81\xa5nonce\xc7\x08\x01" + b"\x00" * 8, "not msgpack"),  # an extension type
    ],
)
def test_what_is_no_message_is_named(frame: bytes, message: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        encoding.decode(frame)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": b"\x00\x00\x00"}, "Piece.lengths is not a whole number of int32 values"),
        ({"lengths": b"\xff\xff\xff\xff" * 2}, "lengths of at least 0"),
        ({"input_ids": b""}, "Piece.input_ids holds 0 values: 5 are expected"),
        ({"keys": b"\x00" * 8}, "Piece.keys holds 1 values: 6 are expected"),
        ({"images": []}, "as many images"),
        ({"images": ["text"]}, "Piece.images"),
        ({"action_shape": [1 << 40, 1]}, "Piece.action_shape"),
        ({"action_shape": [1]}, "Piece.action_shape"),
        ({"actions": b""}, "Piece.actions holds 0 values"),
        ({"skipped": {"a": "b"}}, "Piece.skipped"),
        ({"row_samples": b"\x02"}, "Piece.row_samples is not a whole number of uint16 values"),
        ({"row_samples": b"\x01\x00"}, "Piece.row_samples does not add up to the 2 samples"),
        ({"row_samples": b"\x02\x00\x00\x00"}, "each of at least one sample"),
    ],
)
def test_pieces_that_contradict_themselves(changes: dict[str, object], message: str) -> None:
    body = msgpack.unpackb(encoding.encode(MESSAGES["piece"])[1:], strict_map_key=False)
    with pytest.raises(RemoteProtocolError) as caught:
        encoding.decode(b"P" + msgpack.packb({**body, **changes}))
    assert message in str(caught.value)


def test_control_frames_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "MAX_CONTROL_BYTES", 40)
    with pytest.raises(RemoteProtocolError, match="at most 40"):
        encoding.decode(encoding.encode(MESSAGES["welcome"]))
    encoding.decode(encoding.encode(MESSAGES["ticket"]))
    encoding.decode(encoding.encode(MESSAGES["piece"]))


@pytest.mark.parametrize("name", ["hello", "epoch", "ticket", "ping"])
def test_questions_are_smaller(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = encoding.encode(MESSAGES[name])
    monkeypatch.setitem(encoding.QUESTION_BYTES, type(MESSAGES[name]), len(frame) - 1)
    with pytest.raises(RemoteProtocolError, match=f"at most {len(frame) - 1}"):
        encoding.decode(frame)
    with pytest.raises(
        LocalProtocolError, match=rf"of {len(frame)} bytes: at most {len(frame) - 1} travel to a loader"
    ):
        encoding.encode(MESSAGES[name])
    encoding.decode(encoding.encode(MESSAGES["welcome"]))


def test_a_hello_holds_the_fingerprints_of_thousands_of_entries() -> None:
    names = {f"manifest/train/{number}": "f" * 64 for number in range(11_000)}
    hello = encoding.decode(encoding.encode(Hello(protocol=3, client="c", rank=0, world_size=1, fingerprints=names)))
    assert isinstance(hello, Hello)
    assert len(hello.fingerprints) == 11_000


@pytest.mark.long
def test_small_frames_cannot_take_much_memory() -> None:
    frame = (
        b"W\x9f" + (b"\xdd\x00\x10\x00\x00" + b"\x80" * (1 << 20)) * 15
    )  # 15 MiB of empty maps, 1 GiB if they were made
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RemoteProtocolError, match="more than 1048576 items"):
        encoding.decode(frame)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 250_000  # KiB


def test_peek_ticket() -> None:
    assert encoding.peek_ticket(encoding.encode(MESSAGES["piece"])) == 7
    assert encoding.peek_ticket(encoding.encode(MESSAGES["failure"])) == 7


FINGERPRINTS = {f"name{number:05d}": "value" for number in range(57_000)}
HELLO = {"protocol": 3, "client": "c", "rank": 0, "world_size": 1, "fingerprints": {}}


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (b"H" + msgpack.packb(FINGERPRINTS), "a Hello frame has 57000 fields: 5 are expected"),
        (
            b"H" + msgpack.packb({**HELLO, "fingerprints": FINGERPRINTS}),
            "Hello.fingerprints has 57000 items: at most 16384",
        ),
        (b"E\x83\xa7entries\xdd\x00\x10\x00\x00", "Epoch.entries has 1048576 items: at most 65536"),
        (b"E\x83\xa7entries\x91\xdd\x00\x00\xff\xff", "exceeds max_array_len(0)"),
        (b"E\x83\xa5split\xdd\x00\x00\xff\xff", "exceeds max_array_len(0)"),
        (b"H\x85\xacfingerprints\x91", "not msgpack: ValueError"),
        (b"T" + bytes(600), "a Ticket frame of 601 bytes: at most 512"),
        (b"W" + bytes(1000), "Welcome is for ranks, not for loaders"),
    ],
)
def test_a_loader_stops_reading_a_question_at_what_is_wrong(frame: bytes, message: str) -> None:
    """Reading on would cost up to 0.3 s and hundreds of MB a frame."""
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError) as caught:
            encoding.decode_question(frame)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert message in str(caught.value)
    assert peak < 3 * len(frame) + 200_000


def test_what_a_peer_said_is_shown_on_one_short_line() -> None:
    forged = "x\n2026-01-01 loader-serve INFO all is well\x1b[2J\u202e" + "y" * (1 << 20)
    assert shown(forged) == r"'x\n2026-01-01 loader-serve INFO all is well\x1b[2J\u202e" + "y" * 23
    assert plain(forged, 60) == r"x\n2026-01-01 loader-serve INFO all is well\x1b[2J\u202ey..."
    assert plain("Straße 東京") == "Straße 東京"
    assert len(shown(list(range(1 << 20)))) <= 80
    assert shown({"a\n": 1}) == r"{'a\n': 1}"
