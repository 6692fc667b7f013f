import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker_proto.actions import ActionVocabulary
from stoker_proto.actions.vocabulary import action_tokens
from stoker_proto.errors import ConfigError, DataError

REUSED = ActionVocabulary.reuse_last(vocab_size=32_000, num_codes=256)
ADDED = ActionVocabulary.added(first_id=32_064, num_codes=256)


def test_the_two_modes_on_literal_codes():
    assert REUSED.to_ids([[0, 1], [127, 255]]).tolist() == [[31_999, 31_998], [31_872, 31_744]]
    assert ADDED.to_ids([[0, 1], [127, 255]]).tolist() == [[32_064, 32_065], [32_191, 32_319]]
    assert REUSED.to_codes([31_744, 31_999]).tolist() == [255, 0]
    assert ADDED.to_codes([32_064, 32_319]).tolist() == [0, 255]
    assert REUSED.to_ids([0]).dtype == REUSED.to_codes([31_999]).dtype == np.int32
    assert (REUSED.first_id, REUSED.end_id, ADDED.first_id, ADDED.end_id) == (31_744, 32_000, 32_064, 32_320)


def test_which_ids_are_actions():
    assert REUSED.is_action([31_743, 31_744, 31_999, 32_000]).tolist() == [False, True, True, False]
    assert ADDED.is_action([[32_063, 32_064], [32_319, 32_320]]).tolist() == [[False, True], [True, False]]


def test_action_tokens_are_numbered_from_0():
    assert action_tokens(3) == ["<action_0>", "<action_1>", "<action_2>"]


@settings(deadline=None, database=None)
@given(st.data(), st.sampled_from(["reuse_last", "added"]), st.integers(1, 5_000), st.integers(0, 50_000))
def test_ids_and_codes_are_a_bijection(data, mode, num_codes, extra):
    anchor = num_codes + extra if mode == "reuse_last" else extra
    vocabulary = ActionVocabulary(mode=mode, num_codes=num_codes, anchor_id=anchor)
    codes = data.draw(st.lists(st.integers(0, num_codes - 1), max_size=20))
    ids = vocabulary.to_ids(codes)
    assert vocabulary.is_action(ids).all()
    assert vocabulary.to_codes(ids).tolist() == codes
    assert ActionVocabulary.from_json(vocabulary.to_json()) == vocabulary


def test_json_is_pinned():
    assert REUSED.to_json() == {"mode": "reuse_last", "num_codes": 256, "anchor_id": 32_000}


def test_what_is_no_action_is_refused_by_value():
    with pytest.raises(DataError, match=r"token id 2 is no action token; those are \[31744, 32000\)"):
        REUSED.to_codes([31_999, 2])
    with pytest.raises(DataError, match=r"action code 256 is outside \[0, 256\)"):
        ADDED.to_ids([[256]])
    with pytest.raises(DataError, match="action code -1"):
        REUSED.to_ids([-1])
    with pytest.raises(ConfigError, match="256 action codes do not fit into a vocabulary of 100 tokens"):
        ActionVocabulary.reuse_last(vocab_size=100, num_codes=256)
    with pytest.raises(ConfigError, match="mode 'last'; it is one of reuse_last, added"):
        ActionVocabulary(mode="last", num_codes=1, anchor_id=1)
    with pytest.raises(ConfigError, match="from id -1 on"):
        ActionVocabulary.added(first_id=-1, num_codes=2)
    with pytest.raises(ConfigError, match="0 action codes"):
        ActionVocabulary.added(first_id=1, num_codes=0)
    with pytest.raises(DataError, match="needs mode, num_codes and anchor_id"):
        ActionVocabulary.from_json({"mode": "added"})
