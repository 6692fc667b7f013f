"""The rules of an evaluation that need no simulator: episodes, intervals, what is kept, tables, pictures."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stoker_proto.errors import ConfigError
from trainer.policy_io import Prediction
from trainer.sim.evaluation.episode import Episode, EpisodeResult, Job, Protocol
from trainer.sim.evaluation.intervals import Interval, Pairs, paired_difference, wilson
from trainer.sim.evaluation.pictures import Pictures, write_sheet
from trainer.sim.evaluation.results import Results, fingerprint_of_export
from trainer.sim.evaluation.rollout import Lost
from trainer.sim.evaluation.summary import by_task, compare, comparison_table, table
from trainer.sim.evaluation.swapping import swap_table, swapped, with_swapped
from trainer.sim.tasks.interface import Step, View

JOB = Job(task="task", seed=3)


def view(value: int, cameras: int = 1) -> View:
    """Pictures of one colour each; camera c has value + 100 c."""
    images = tuple(np.full((4, 4, 3), value + 100 * camera, np.uint8) for camera in range(cameras))
    return View(images=images, states={"qpos": np.array([value, 0.5], np.float32)})


def prediction(*actions: float) -> Prediction:
    return Prediction(actions=np.array(actions, np.float32)[:, None], ids=np.zeros(0, np.int64), outside_mass=0.25)


def play(successes: str, limit: int = 50, protocol: Protocol | None = None) -> EpisodeResult:
    """An episode whose step i succeeds where successes[i - 1] is +; the last sign goes on for ever."""
    episode = Episode(JOB, protocol or Protocol(execute=1))
    episode.begin(view(0), "push", limit)
    for step in range(1, 1000):
        episode.predicted(prediction(0.0))
        episode.next_action()
        success = successes[min(step, len(successes)) - 1] == "+"
        if episode.observe(Step(view=view(step % 100), success=success, reward=0.5)):
            return episode.result()
    raise AssertionError("the episode does not end")


@pytest.mark.parametrize(
    ("successes", "limit", "steps", "first", "at_end"),
    [
        ("-", 50, 50, None, False),
        ("--+", 50, 13, 3, True),  # ten steps after the first success
        ("--+-", 50, 13, 3, False),  # it rolled off
        ("--+---------+", 50, 13, 3, True),
        ("--+----------+", 50, 13, 3, False),  # it came back one step too late
        ("-----+", 8, 8, 6, True),  # the limit comes first
        ("-------+", 8, 8, 8, True),
        ("--------+", 8, 8, None, False),
    ],
)
def test_an_episode_ends_ten_steps_after_success_or_at_its_limit(
    successes: str, limit: int, steps: int, first: int | None, at_end: bool
) -> None:
    result = play(successes, limit)
    assert (result.steps, result.steps_to_success, result.success_at_end) == (steps, first, at_end)
    assert result.success_once == (first is not None)
    assert (result.task, result.seed, result.instruction) == ("task", 3, "push")
    assert (result.reward, result.outside_mass) == (0.5, 0.25)


def test_the_limit_of_the_protocol_goes_before_that_of_the_task() -> None:
    assert play("-", 50, Protocol(execute=1, max_steps=7)).steps == 7


def test_k_actions_of_a_chunk_are_executed_then_the_policy_looks_again() -> None:
    episode = Episode(JOB, Protocol(execute=2))
    episode.begin(view(0), "push", 50)
    executed = []
    for step in range(5):
        if episode.needs_prediction:
            episode.predicted(prediction(step + 0.1, step + 0.2, step + 0.3))
        executed.append(round(float(episode.next_action()[0]), 1))
        episode.observe(Step(view=view(step + 1), success=False))
    assert executed == [0.1, 0.2, 2.1, 2.2, 4.1]


def test_the_policy_is_told_pictures_of_earlier_timesteps_camera_by_camera() -> None:
    episode = Episode(JOB, Protocol(execute=1, image_history=(-2, 0), state="qpos"))
    episode.begin(view(1, cameras=2), "push", 50)
    told = []
    for step in range(4):
        one = episode.policy_input()
        told.append([int(image[0, 0, 0]) for image in one.images])
        assert one.instruction == "push"
        assert one.state is not None
        assert one.state.tolist() == [step + 1, 0.5]
        episode.predicted(prediction(0.0))
        episode.next_action()
        episode.observe(Step(view=view(step + 2, cameras=2), success=False))
    assert told == [[1, 1, 101, 101], [1, 2, 101, 102], [1, 3, 101, 103], [2, 4, 102, 104]]


@pytest.mark.parametrize(
    ("successes", "number", "low", "high"),
    [  # the first two: R. G. Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (30, 30, 0.8865, 1.0),
        (0, 30, 0.0, 0.1135),
    ],
)
def test_wilson(successes: int, number: int, low: float, high: float) -> None:
    found = wilson(successes, number)
    assert found.value == successes / number
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@pytest.mark.parametrize(
    ("pairs", "value", "low", "high"),
    [
        ((36, 12, 2, 0), 0.2, 0.0569, 0.3404),  # Newcombe, Statistics in Medicine 17 (1998) 2635-2650, method 10
        ((1, 1, 7, 12), -0.2857, -0.5069, -0.0256),  # Bentur et al. 2009, as in Fagerland et al., Contingency Tables
        ((10, 0, 0, 90), 0.0, -0.0353, 0.0353),  # equal outcomes are no proof of equal policies
        ((0, 5, 0, 0), 1.0, 0.3855, 1.0),
    ],
)
def test_paired_difference(pairs: tuple[int, int, int, int], value: float, low: float, high: float) -> None:
    both, first, second, neither = pairs
    found = paired_difference(Pairs(both=both, only_first=first, only_second=second, neither=neither))
    expected = [pytest.approx(number, abs=5e-5) for number in (value, low, high)]
    assert [found.value, found.low, found.high] == expected
    mirrored = paired_difference(Pairs(both=both, only_first=second, only_second=first, neither=neither))
    assert [mirrored.value, mirrored.high, mirrored.low] == [
        pytest.approx(-number, abs=5e-5) for number in (value, low, high)
    ]


def result(
    seed: int, *, once: bool, end: bool | None = None, task: str = "push", instruction: str = "go"
) -> EpisodeResult:
    return EpisodeResult(
        task=task,
        seed=seed,
        instruction=instruction,
        success_once=once,
        success_at_end=once if end is None else end,
        steps=20,
        steps_to_success=10 + seed if once else None,
        reward=0.25 * seed,
        outside_mass=0.01,
    )


def test_figures_per_task_and_instruction() -> None:
    results = [
        result(0, once=True, instruction="a"),
        result(1, once=True, end=False, instruction="a"),
        result(2, once=False, instruction="b"),
        result(0, once=False, task="pull"),
    ]
    figures = by_task(results)
    push = figures["push"]
    assert (push["episodes"], push["steps_to_success"], push["reward"]) == (3, 10.5, 0.25)
    assert push["success_once"]["value"] == pytest.approx(2 / 3)
    assert push["success_at_end"]["value"] == pytest.approx(1 / 3)
    assert {text: one["success_once"]["value"] for text, one in push["instructions"].items()} == {"a": 1.0, "b": 0.0}
    assert figures["pull"]["steps_to_success"] is None
    lines = [line.split() for line in table(figures).splitlines()]
    assert lines[1][:4] == ["push", "3", "66.7%", "[20.8,"]
    assert [line[0] for line in lines[1:]] == ["push", "a", "b", "pull"]
    many = by_task([result(seed, once=True, instruction=f"text {seed}") for seed in range(13)])
    assert len(table(many).splitlines()) == 2, "an instruction of its own for each episode is no line of the table"


def test_only_seeds_that_both_have_finished_are_compared() -> None:
    first = [result(seed, once=seed < 3) for seed in range(4)]
    second = [result(seed, once=seed < 1, end=False) for seed in range(1, 9)]
    rows = compare(first, second)
    once, end = rows
    assert (once["both"], once["only_first"], once["only_second"], once["neither"]) == (0, 2, 0, 1)
    assert once["difference"]["value"] == pytest.approx(2 / 3)
    assert (end["success"], end["only_first"]) == ("success_at_end", 2)
    assert "+66.7 [" in comparison_table(rows)
    assert compare(first, []) == []


def test_outcomes_are_counted_by_the_instruction_that_was_told_in_the_same_scenes() -> None:
    tasks = with_swapped(["StackGreenOnRed-v1"])
    assert tasks == ["StackGreenOnRed-v1", "StackCube-v1"]
    told = {"StackCube-v1": "red on green", "StackGreenOnRed-v1": "green on red"}
    done = {  # seed -> what was done when told red on green, and when told green on red
        0: ("red on green", "green on red"),
        1: ("red on green", "red on green"),
        2: ("", "green on red"),
        3: ("", ""),
    }
    results = [
        replace(result(seed, once=outcome == told[task], task=task, instruction=told[task]), outcome=outcome)
        for seed, outcomes in done.items()
        for task, outcome in zip(told, outcomes, strict=True)
    ]
    results.append(result(9, once=True, task="StackCube-v1", instruction="red on green"))  # the other is not finished
    [row] = swapped(results, ["PushCube-v1", *tasks])
    assert row["tasks"] == tasks
    assert row["scenes"] == 4
    assert row["outcomes"] == {
        "green on red": {"green on red": 2, "red on green": 1, "nothing": 1},
        "red on green": {"red on green": 2, "nothing": 2},
    }
    assert row["followed"]["value"] == 0.25
    assert row["ignored"]["value"] == 0.25
    lines = swap_table([row]).splitlines()
    assert lines[0].split("  ")[-3:] == ["green on red", "red on green", "nothing"]
    assert [line.split()[-3:] for line in lines[1:3]] == [["2", "1", "1"], ["0", "2", "2"]]
    assert lines[3].startswith(
        "of 4 scenes: both instructions followed 25.0% [4.6, 69.9], the same done under both 25.0%"
    )
    assert swapped(results[-1:], tasks) == []


MODELS = {"model": {"path": "a", "fingerprint": "f1", "protocol": {"execute": 1}}}


def test_finished_episodes_are_kept_and_lost_ones_are_not(tmp_path: Path) -> None:
    jobs = [Job(task="push", seed=seed) for seed in range(3)]
    results = Results(tmp_path / "out", {"size": (1, 2)}, MODELS)
    results.add("model", result(0, once=True))
    results.add("model", Lost(job=jobs[1], reason="exit code 7"))
    again = Results(tmp_path / "out", {"size": (1, 2)}, {**MODELS, "other": MODELS["model"]})
    assert again.of("model") == [result(0, once=True)]
    assert again.missing("model", jobs) == jobs[1:]
    assert again.missing("other", jobs) == jobs
    tree = json.loads((tmp_path / "out" / "results.json").read_text())
    assert tree["deaths"] == [{"model": "model", "task": "push", "seed": 1, "reason": "exit code 7"}]


@pytest.mark.parametrize(
    ("setup", "model", "expected"),
    [
        ({"size": 3}, {}, "size: 2 there, 3 now"),
        ({"size": 2}, {"fingerprint": "f2"}, "model weights: f1 there, f2 now"),
        ({"size": 2}, {"protocol": {"execute": 4}}, "execute: 1 there, 4 now"),
    ],
)
def test_episodes_of_another_evaluation_are_not_mixed(
    setup: dict[str, Any], model: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    Results(tmp_path, {"size": 2}, MODELS).add("model", result(0, once=True))
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(ConfigError, match=rf"{expected}.* choose another --out"):
        Results(tmp_path, setup, {"model": {**MODELS["model"], **model}})
    assert (tmp_path / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda tree: "not JSON",
        lambda tree: json.dumps({**tree, "format": 0}),
        lambda tree: json.dumps({**tree, "episodes": [{"model": "model", "task": "push"}]}),
        lambda tree: json.dumps({name: value for name, value in tree.items() if name != "models"}),
        lambda tree: "[]",
    ],
)
def test_a_damaged_file_is_refused(damage: Callable[[dict[str, Any]], str], tmp_path: Path) -> None:
    Results(tmp_path, {}, MODELS)
    file = tmp_path / "results.json"
    file.write_text(damage(json.loads(file.read_text())))
    with pytest.raises(ConfigError, match=r"results\.json .* choose another --out"):
        Results(tmp_path, {}, MODELS)


def test_the_fingerprint_follows_weights_and_processor_only(tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json", "stoker_processor.json", "chat_template.jinja"):
        (tmp_path / name).write_text(name)
    before = fingerprint_of_export(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("other")
    assert fingerprint_of_export(tmp_path) == before
    (tmp_path / "model.safetensors").write_text("other")
    changed = fingerprint_of_export(tmp_path)
    assert changed != before
    (tmp_path / "stoker_processor.json").write_text("other")
    assert fingerprint_of_export(tmp_path) not in (before, changed)


def test_videos_of_the_first_successes_and_failures_and_a_sheet(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    pictures = Pictures(tmp_path / "videos", "model", 1)
    for seed, once in ((0, False), (1, False), (2, True), (3, True)):
        job = Job(task="a/b", seed=seed)
        for step in range(5):
            pictures.saw(job, [np.full((30, 50, 3), 40 * step + 20, np.uint8)])
        pictures.ended(job, result(seed, once=once, task="a/b"))
    names = sorted(path.name for path in (tmp_path / "videos").glob("*.mp4"))
    assert names == ["model_a-b_seed00000_failure.mp4", "model_a-b_seed00002_success.mp4"]
    with av.open(str(tmp_path / "videos" / names[0])) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert [frame.shape for frame in frames] == [(150, 250, 3)] * 5
    assert [round(float(frame.mean())) for frame in frames] == [
        pytest.approx(40 * step + 20, abs=4) for step in range(5)
    ]
    assert write_sheet(tmp_path / "videos", tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * (16 + 128), 8 * 128, 3)
    tiles = sheet[16 + 30, 64 : 5 * 128 : 128, 0]  # one pixel in the middle of each picture of the first row
    assert tiles.tolist() == [20, 60, 100, 140, 180]


def test_an_episode_whose_simulator_died_gives_no_video(tmp_path: Path) -> None:
    pictures = Pictures(tmp_path / "videos", "model", 1)
    pictures.saw(JOB, [np.zeros((8, 8, 3), np.uint8)])
    pictures.ended(JOB, None)
    assert not (tmp_path / "videos").exists()
    assert not write_sheet(tmp_path / "videos", tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()


def test_no_episode_says_nothing() -> None:
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0.0, 1.0)
    empty = paired_difference(Pairs(both=0, only_first=0, only_second=0, neither=0))
    assert isinstance(empty, Interval)
    assert (empty.low, empty.high) == (-1.0, 1.0)
