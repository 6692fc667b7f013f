"""A ticket is a credit: it is taken when it comes, and given back when it is answered."""

from __future__ import annotations

from loader_service.server.clients import MAX_ROWS_PER_CLIENT, MAX_TICKETS_PER_CLIENT, Client, Clients
from stoker_proto.wire.messages import Ticket


def ticket(number: int, count: int = 1) -> Ticket:
    return Ticket(ticket=number, split="train", epoch=0, lane=0, start=0, count=count)


def reason(client: Client, asked: Ticket) -> str:
    refusal = client.refusal(asked)
    return refusal[0] if refusal else ""


def test_answered_tickets_give_their_credits_back() -> None:
    client = Client()
    for number in range(3 * MAX_TICKETS_PER_CLIENT):
        asked = ticket(number, MAX_ROWS_PER_CLIENT // 2)
        assert client.refusal(asked) is None
        client.begin(asked, worker=0)
        client.end(number)
        client.end(number)  # a second time it is worth nothing
    assert client.num_rows == 0


def test_tickets_in_work_are_counted() -> None:
    client = Client()
    for number in range(MAX_TICKETS_PER_CLIENT):
        assert client.refusal(ticket(number)) is None
        client.begin(ticket(number), worker=0)
    assert reason(client, ticket(9999)) == "unavailable"
    client.end(5)
    assert client.refusal(ticket(9999)) is None


def test_rows_in_work_are_counted() -> None:
    client = Client()
    client.begin(ticket(0, MAX_ROWS_PER_CLIENT - 1), worker=0)
    assert client.refusal(ticket(1, 1)) is None
    assert reason(client, ticket(1, 2)) == "unavailable"
    assert reason(client, ticket(1, MAX_ROWS_PER_CLIENT + 1)) == "rejected"


def test_who_was_not_heard_of_for_longest_is_forgotten_first() -> None:
    clients, most = Clients(), 16_384
    addresses = [number.to_bytes(5, "big") for number in range(most)]
    assert [clients.admit(address) for address in addresses] == [[]] * most
    assert clients.heard(addresses[0])
    assert clients.admit(b"new") == [addresses[1]]
    assert not clients.heard(addresses[1])
    assert clients.heard(addresses[0])


def test_who_went_is_no_stranger_until_many_others_went() -> None:
    clients = Clients()
    clients.forget(b"stranger")
    assert not clients.is_gone(b"stranger")
    for number in range(1025):
        clients.admit(number.to_bytes(5, "big"))
        clients.forget(number.to_bytes(5, "big"))
    first, second = (number.to_bytes(5, "big") for number in (0, 1))
    assert not clients.is_gone(first)
    assert clients.is_gone(second)
    assert not clients.heard(second)
    clients.admit(second)
    assert not clients.is_gone(second)
