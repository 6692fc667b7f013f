import itertools

import numpy as np
import pytest

from stoker_proto.actions.byte_pairs import PairEncoder, expand, learn_merges
from stoker_proto.actions.kmeans import uniform
from stoker_proto.errors import DataError


def learn_slowly(rows, num_symbols, vocab_size, min_frequency):
    """The rule in plain Python: counts every pair anew for each merge."""
    sequences = [list(row) for row in rows]
    expansions = [(symbol,) for symbol in range(num_symbols)]
    merges = []
    while len(expansions) < vocab_size:
        counts = {}
        for sequence in sequences:
            for pair in itertools.pairwise(sequence):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        if counts[best] < min_frequency:
            break
        merges.append(best)
        expansion = expansions[best[0]] + expansions[best[1]]
        if expansion not in expansions:
            expansions.append(expansion)
        sequences = [merge_slowly(sequence, best, expansions.index(expansion)) for sequence in sequences]
    return merges


def merge_slowly(sequence, pair, token):
    merged, at = [], 0
    while at < len(sequence):
        if tuple(sequence[at : at + 2]) == pair:
            merged.append(token)
            at += 2
        else:
            merged.append(sequence[at])
            at += 1
    return merged


def skewed_rows(count, length, num_symbols, seed):
    """Symbols of which the small ones, and runs of them, are frequent."""
    draws = uniform(count * length, seed).reshape(count, length)
    return np.minimum((draws**3 * num_symbols).astype(np.int64), num_symbols - 1)


def test_a_row_worked_out_by_hand():
    """(0, 0) occurs 3 times (twice in the run); then 2 1 2 and 2 0 have one pair each: below the minimum."""
    rows = np.array([[0, 0, 0, 1, 0, 0]])
    assert learn_merges(rows, 2, 100, 2) == [(0, 0)]
    assert learn_merges(rows, 2, 100, 1) == [(0, 0), (0, 1), (2, 3), (4, 2)]
    assert learn_merges(rows, 2, 3, 1) == [(0, 0)]
    encoder = PairEncoder(2, [(0, 0)])
    assert encoder.encode(rows[0]).tolist() == [2, 0, 1, 2]
    assert encoder.decode([2, 0, 1, 2]) == [0, 0, 0, 1, 0, 0]


def test_pairs_do_not_reach_over_the_ends_of_rows():
    assert learn_merges(np.array([[0, 1], [0, 1]]), 2, 100, 2) == [(0, 1)]
    assert learn_merges(np.array([[1, 0], [1, 0], [1, 0]]), 2, 100, 2) == [(1, 0)]
    assert learn_merges(np.array([[0], [1], [0], [1]]), 2, 100, 1) == []


@pytest.mark.parametrize("seed", range(6))
def test_merges_are_those_of_the_rule(seed):
    rows = skewed_rows(40, 30, 3 + seed, seed)
    num_symbols = int(rows.max()) + 1
    assert learn_merges(rows, num_symbols, 90, 2) == learn_slowly(rows.tolist(), num_symbols, 90, 2)


@pytest.mark.parametrize("seed", range(3))
def test_rows_are_encoded_by_merges_in_their_rank(seed):
    """`tokenizers` against merging rank by rank."""
    rows = skewed_rows(60, 40, 5, seed)
    merges = learn_merges(rows[:30], 5, 120, 2)
    encoder = PairEncoder(5, merges)
    assert len(encoder.expansions) <= 120
    for row in rows:
        sequence = row.tolist()
        for pair in merges:
            token = encoder.expansions.index(encoder.expansions[pair[0]] + encoder.expansions[pair[1]])
            sequence = merge_slowly(sequence, pair, token)
        assert encoder.encode(row).tolist() == sequence
        assert encoder.decode(sequence) == row.tolist()


def test_two_ways_to_one_token():
    """(0 (1 2)) and ((0 1) 2) are the same symbols, so the same token."""
    expansions = expand(3, [(0, 1), (1, 2), (0, 4), (3, 2), (5, 5)])
    assert expansions == [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2), (0, 1, 2, 0, 1, 2)]


def test_damaged_merges_are_refused():
    with pytest.raises(DataError, match="a merge of tokens 0 and 7; run loader-prepare again"):
        expand(3, [(0, 7)])
