"""Rows that public bug reports are about (`cases/chat` of the shared data): what is learned of each."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from loader_service.sources.base import BaseSFTDataset, Sample
from loader_service.sources.tables.dataset import TableDataset
from stoker_proto.errors import DataError
from stoker_proto.text.turns import Call

SHARED = Path(os.environ.get("STOKER_SHARED_DATA", Path(__file__).parents[5] / "shared" / "data"))
Make = Callable[..., TableDataset]
Read = Callable[[BaseSFTDataset, Path], list[Sample]]


@pytest.fixture
def case() -> Callable[[str], Path]:
    def path(name: str) -> Path:
        file = SHARED / "cases" / "chat" / f"{name}.jsonl"
        if not file.is_file():
            pytest.skip(f"NOT TESTED: {file} is not there; set STOKER_SHARED_DATA to the folder that holds cases/")
        return file

    return path


def learned(samples: list[Sample]) -> list[list[str]]:
    return [[turn.text for turn in sample.turns if turn.learned] for sample in samples]


def test_flags_say_what_is_learned(case: Callable[[str], Path], make_tables: Make, read_shard: Read) -> None:
    assert learned(read_shard(make_tables("chat"), case("weights"))) == [["learned"], ["learned"]]


def test_preferences_are_refused(case: Callable[[str], Path], make_tables: Make, read_shard: Read) -> None:
    with pytest.raises(DataError, match=r"preference\.jsonl.*a preference row \(chosen and rejected\)"):
        read_shard(make_tables("chat"), case("preference"))


def test_prompt_and_completion(case: Callable[[str], Path], make_tables: Make, read_shard: Read) -> None:
    [sample] = read_shard(make_tables("chat"), case("prompt_completion"))
    assert [(turn.role, turn.text, turn.learned) for turn in sample.turns] == [
        ("user", "Hi", False),
        ("assistant", "Hello.", True),
    ]


def test_reasoning_stands_beside_the_answer(case: Callable[[str], Path], make_tables: Make, read_shard: Read) -> None:
    [sample] = read_shard(make_tables("chat"), case("reasoning"))
    assert (sample.turns[-1].text, sample.turns[-1].reasoning) == ("42", "six sevens are forty-two")
    [sample] = read_shard(make_tables("chat", reasoning="inline"), case("reasoning"))
    assert sample.turns[-1].text == "<think>\nsix sevens are forty-two\n</think>\n\n42"


def test_a_history_keeps_its_turns(case: Callable[[str], Path], make_tables: Make, read_shard: Read) -> None:
    assert learned(read_shard(make_tables("chat"), case("history"))) == [
        ["<think>\nshort\n</think>\n\n1", "<think>\nalso short\n</think>\n\n2"]
    ]


def test_tools_of_one_row_are_none_of_the_next(
    case: Callable[[str], Path], make_tables: Make, read_shard: Read
) -> None:
    first, second = read_shard(make_tables("chat"), case("tools"))
    assert [tool["function"]["name"] for tool in first.tools] == ["weather"]
    assert first.turns[1].calls == (Call("weather", {}),)  # the arguments are an empty text
    assert second.tools == ()
    assert learned([first, second]) == [["", "Three degrees."], ["Hi."]]


def test_labels_beside_ids(case: Callable[[str], Path], make_tables: Make, read_shard: Read) -> None:
    [sample] = read_shard(make_tables("text"), case("tokenised"))
    assert sample.input_ids is not None
    assert sample.labels is not None
    assert (sample.input_ids.tolist(), sample.labels.tolist()) == ([5, 6, 7, 8, 9], [-100, -100, -100, 8, 9])
