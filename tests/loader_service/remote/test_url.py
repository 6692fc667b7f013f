"""URLs of the data paths: what is read, what is refused, where copies lie."""

from __future__ import annotations

import pytest

from loader_service.remote.url import Place, is_url, parse_url
from stoker_proto.errors import ConfigError


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("s3://robots/bridge/*.jsonl", Place("s3", "robots", "bridge/*.jsonl")),
        ("S3://robots", Place("s3", "robots", "")),
        ("https://host:8080/a%20b/c.jsonl", Place("https", "host:8080", "a%20b/c.jsonl")),
        ("memory://a/b/", Place("memory", "", "a/b")),
        ("file:///data/demos", Place("file", "", "data/demos")),
    ],
)
def test_parts(url: str, place: Place) -> None:
    assert is_url(url)
    assert parse_url(url) == place


@pytest.mark.parametrize("path", ["/data/demos", "demos/*.jsonl", "C:/demos", "my:data", "9://x"])
def test_paths_are_no_urls(path: str) -> None:
    assert not is_url(path)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://me:pass@host/a.jsonl", r"'https://host/a\.jsonl' carries a user or a password: leave them out"),
        ("https://host/a.jsonl?sig=secret", r"'https://host/a\.jsonl' has a query"),
        ("https://host/a.jsonl#x", "has a query or a fragment"),
        ("simplecache::s3://robots/a", "no URL|chains of file systems"),
        ("zip://a.jsonl::s3://robots/a.zip", "chains of file systems"),
        ("s3:///robots", "names no host or bucket"),
        ("s3://robots/../other", r"an empty part, \. or \.\. in its name"),
        ("s3://robots/a//b", r"an empty part"),
    ],
)
def test_what_cannot_be_fetched_is_refused(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        parse_url(url)
    assert "pass@" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_another_endpoint_is_another_folder() -> None:
    place = parse_url("s3://robots/a")
    assert place.folder_name({}) == "s3-robots-" + place.folder_name({})[-8:]
    assert (
        len(
            {
                place.folder_name({}),
                place.folder_name({"endpoint_url": "https://x"}),
                Place("s3", "r", "a").folder_name({}),
            }
        )
        == 3
    )


def test_names_of_files_are_no_queries() -> None:
    assert Place("https", "host", "a").url("why?/no#1.npz") == "https://host/why%3F/no%231.npz"
    assert Place("memory", "", "a").url("b") == "memory:///b"


def test_the_folder_before_wildcards() -> None:
    assert parse_url("s3://robots/a/*/b.jsonl").folder_key == "a"
    assert parse_url("s3://robots/*.jsonl").folder_key == ""
    assert not parse_url("https://host/[1].jsonl").has_wildcards
