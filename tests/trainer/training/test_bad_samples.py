"""The list of what was skipped: whole while it is short, bounded however bad the data is."""

from trainer.training.bad_samples import MAX_NAMED, MAX_SHOWN, Skipped


def test_samples_are_counted_by_their_reason() -> None:
    skipped = Skipped()
    skipped.add(["b: bad", "a: bad", "b: bad"])
    assert skipped.named == {"b: bad": 2, "a: bad": 1}
    assert skipped.num_samples == 3
    assert skipped.lines() == ["2 samples: b: bad", "1 samples: a: bad"]
    assert Skipped().lines() == []


def test_it_stays_short_and_says_what_it_left_out() -> None:
    skipped = Skipped()
    skipped.add(f"{number}: {'x' * 10_000}" for number in range(3 * MAX_NAMED))
    assert len(skipped.named) == MAX_NAMED
    assert max(map(len, skipped.named)) == 400
    assert skipped.num_samples == 3 * MAX_NAMED
    lines = skipped.lines()
    assert len(lines) == MAX_SHOWN + 1
    assert lines[-1] == f"{3 * MAX_NAMED - MAX_SHOWN} samples of other records"


def test_those_of_several_ranks_are_added_up() -> None:
    total, other = Skipped(), Skipped()
    total.add(["a", "b"])
    other.add(["b", "c"])
    total.merge(other.named, 5)
    assert total.named == {"a": 1, "b": 2, "c": 1}
    assert total.num_samples == 9
