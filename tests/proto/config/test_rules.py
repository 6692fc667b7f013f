"""Rules between keys, and the arithmetic of a global batch."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker_proto.config import check_batch_arithmetic
from stoker_proto.config.placement import parse_slots
from stoker_proto.config.reader import load_config
from stoker_proto.config.rules import above, allowed, at_least, both, check_ranges
from stoker_proto.errors import ConfigError

MINIMAL = """
cluster: {component_placement: {trainer: 0-2, dataloader: 0}}
model: {base_model_path: m}
data: {dataset_type: mani_openpi, train_data_paths: [t.jsonl], max_seq_len: 64}
trainer: {micro_batch_size: 4, global_batch_size: 24, lr: 1e-3}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(MINIMAL)
    return file


def test_an_impossible_global_batch_is_refused_with_the_numbers_and_the_nearest_that_work(minimal: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, ["trainer.global_batch_size=64"])
    message = str(caught.value)
    for part in ("trainer.global_batch_size is 64", "micro_batch_size 4 x 3 trainer ranks = 12", "60 or 72"):
        assert part in message
    for works in ("60", "72"):
        assert load_config(minimal, [f"trainer.global_batch_size={works}"])


def test_a_global_batch_below_one_pass_names_the_one_that_works(minimal: Path) -> None:
    with pytest.raises(ConfigError, match=r"e\.g\. 12$"):
        load_config(minimal, ["trainer.global_batch_size=5"])


def test_without_trainer_slots_the_launcher_s_ranks_decide_later(minimal: Path) -> None:
    overrides = ["trainer.global_batch_size=5", "cluster.component_placement={dataloader: 0}"]
    assert load_config(minimal, overrides).cluster.component_placement.trainer == ()


@given(global_batch=st.integers(1, 10_000), micro_batch=st.integers(1, 64), ranks=st.integers(1, 64))
def test_the_arithmetic_divides_or_names_neighbours_that_do(global_batch: int, micro_batch: int, ranks: int) -> None:
    try:
        accumulation = check_batch_arithmetic(global_batch, micro_batch, ranks)
    except ConfigError as error:
        nearest = [int(word) for word in str(error).partition("e.g. ")[2].replace(" or ", " ").split()]
        assert global_batch not in nearest
        assert all(number > 0 and number % (micro_batch * ranks) == 0 for number in nearest)
        assert min(abs(number - global_batch) for number in nearest) < micro_batch * ranks
    else:
        assert accumulation * micro_batch * ranks == global_batch


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.num_nodes=0", "cluster.num_nodes is 0: it must be at least 1"),
        ("data.max_seq_len=0", "data.max_seq_len is 0: it must be at least 1"),
        ("data.order.lanes=-3", "data.order.lanes is -3: it must be at least 1"),
        ("data.action.chunk=0", "data.action.chunk is 0: it must be at least 1"),
        ("trainer.micro_batch_size=0", "trainer.micro_batch_size is 0: it must be at least 1"),
        ("trainer.global_batch_size=0", "trainer.global_batch_size is 0: it must be at least 1"),
        ("trainer.epochs=0", "trainer.epochs is 0: it must be at least 1"),
        ("trainer.feed.prefetch=0", "trainer.feed.prefetch is 0: it must be at least 1"),
        ("trainer.lr=0", "trainer.lr is 0.0: it must be above 0"),
        ("trainer.lr=-1e-5", "trainer.lr is -1e-05: it must be above 0"),
        ("trainer.feed.hedge_share=1.5", "trainer.feed.hedge_share is 1.5: it must lie in"),
        ("trainer.feed.hedge_multiple=0.5", "trainer.feed.hedge_multiple is 0.5: it must be at least 1"),
        (
            "trainer.feed.takeover_ratio=1",
            "trainer.feed.takeover_ratio is 1.0: it must be above 1, or 0 for no takeover",
        ),
        ("trainer.feed.backoff_s=-1", "trainer.feed.backoff_s is -1.0: it must not be negative"),
        ("trainer.feed.ticket_deadline_s=0", "ticket_deadline_s is 0.0: it must be above 0"),
        ("model.lora={targets: []}", r"model.lora.targets is \(\): name a layer at least, or auto"),
        ("trainer.parameter_groups=[{match: [], lr: 1}]", r"groups\[0\].match is \(\): write a pattern at least"),
        ("trainer.betas=[0.9, 95]", r"trainer.betas is \(0.9, 95.0\): both must lie in \[0, 1\)"),
        (
            "trainer.parameter_groups=[{match: a, lr: 1e-5}, {match: b, lr: -1e-5}]",
            r"trainer.parameter_groups\[1\].lr is -1e-05: it must be above 0",
        ),
        (
            "trainer.checkpoint.best={metric: perplexity}",
            "best.metric is perplexity: write it as it is logged: val/perplexity",
        ),
        ("trainer.eval_interval=-1", "trainer.eval_interval is -1: it must not be negative"),
        ("trainer.grad_clip=-1", "trainer.grad_clip is -1.0: it must not be negative"),
        ("trainer.max_steps=0", "trainer.max_steps is 0: at least 1, or null"),
        ("trainer.warmup_ratio=1.5", r"trainer.warmup_ratio is 1.5: it must lie in \[0, 1\]"),
        ("data.augment.brightness=2", "data.augment.brightness is 2.0: it must lie in"),
        ("data.augment.crop_area=0", "data.augment.crop_area is 0.0: it must be above 0"),
        ("data.augment.crop_area=1.1", "data.augment.crop_area is 1.1: a share of the image, at most 1"),
        ("data.image.quality=0", "data.image.quality is 0: JPEG quality lies in 1-100"),
        ("data.image.quality=101", "data.image.quality is 101"),
        (
            "cluster.loader_addresses=[]",
            r"cluster.loader_addresses is empty: name at least one loader, e\.g\. \[tcp://",
        ),
        ("data.train_data_paths=[]", "data.train_data_paths is empty: name at least one"),
        ("data.dialogue.template=custom", "data.dialogue.user is None and data.dialogue.template is 'custom'"),
        ("data.dialogue.user='{image}'", "`user` goes with `template: custom` and only with it"),
    ],
)
def test_a_value_outside_its_range_is_refused_in_one_line(minimal: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(minimal, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.val_data_paths=[v.jsonl]", "trainer.checkpoint.best={metric: val/score}"],
            r"metric is 'val/score', of which it is not known whether smaller or larger is better: set "
            r"trainer\.checkpoint\.best\.mode to min or max",
        ),
        (
            ["trainer.min_lr_ratio=0.1", "trainer.lr_schedule=constant"],
            "min_lr_ratio is 0.1 and trainer.lr_schedule is constant, which keeps to lr: take the cosine",
        ),
        (
            ["trainer.reduce_dtype=bf16", "model.precision=fp32"],
            "reduce_dtype is bf16 and model.precision is fp32, whose gradients are added up in fp32",
        ),
    ],
)
def test_keys_that_would_do_nothing_together_are_refused(minimal: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(minimal, overrides)


def test_values_at_the_edge_of_their_range_are_taken(minimal: Path) -> None:
    config = load_config(
        minimal,
        [
            *("trainer.eval_interval=0", "trainer.grad_clip=0", "trainer.warmup_ratio=1", "trainer.max_steps=1"),
            *("data.image.quality=100", "data.augment.crop_area=1", "data.val_data_paths=[]", "loader.workers=0"),
            *("data.dialogue={template: custom, user: 'Q: {instruction} A:'}", "trainer.checkpoint.interval=0"),
        ],
    )
    assert (config.trainer.warmup_ratio, config.data.image.quality, config.loader.workers) == (1, 100, 0)


@pytest.mark.parametrize(
    ("written", "slots"),
    [
        ("4-7", (4, 5, 6, 7)),
        ("4", (4,)),
        (4, (4,)),
        ("0,2-3", (0, 2, 3)),
        (" 1 , 5-6 ", (1, 5, 6)),
        ("3-3", (3,)),
        ("", ()),
    ],
)
def test_slots_are_read_as_written(written: object, slots: tuple[int, ...]) -> None:
    assert parse_slots(written, "trainer") == slots


@given(st.sets(st.integers(0, 99), min_size=1))
def test_any_list_of_slots_is_read_back(slots: set[int]) -> None:
    assert parse_slots(",".join(map(str, sorted(slots))), "trainer") == tuple(sorted(slots))


@settings(deadline=None)  # a range may have a million slots
@given(st.text(alphabet="0123456789-, ²a", max_size=8))
def test_text_is_slots_or_a_refusal_that_names_the_key(text: str) -> None:
    key = "cluster.component_placement.trainer"
    try:
        slots = parse_slots(text, key)
    except ConfigError as error:
        if not str(error).startswith(f"{key} is {text!r}: "):
            raise
    else:
        assert len(set(slots)) == len(slots)


def test_rules_of_one_number_are_checked_in_their_order_and_nested_sections_are_reached() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Inner:
        share: float = field(default=0.5, metadata=both(above(0), allowed("at most 1", lambda share: share <= 1)))

    @dataclass(frozen=True, kw_only=True)
    class Outer:
        count: int = field(metadata=at_least(2))
        inner: Inner = field(default_factory=Inner)

    check_ranges(Outer(count=2))
    for outer, message in (
        (Outer(count=1), "a.count is 1: it must be at least 2"),
        (Outer(count=2, inner=Inner(share=0)), "a.inner.share is 0: it must be above 0"),
        (Outer(count=2, inner=Inner(share=1.5)), "a.inner.share is 1.5: at most 1"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_ranges(outer, "a.")
        assert str(caught.value) == message
