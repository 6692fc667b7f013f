"""A trajectory's samples: which actions and frames each has."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from loader_service.sources.trajectory import Trajectory, moments


def test_chunks_repeat_the_last_action_and_say_so() -> None:
    positions, is_pad = moments(4, np.arange(3))
    assert positions.tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 3], [3, 3, 3]]
    assert is_pad.tolist() == [[False] * 3, [False] * 3, [False, False, True], [False, True, True]]
    assert moments(0, np.arange(3)).positions.shape == (0, 3)


def test_samples_are_made_of_the_moments_around_each_timestep() -> None:
    """Timestep 1 moves nothing: it is no sample and in no chunk, but its frame is the history of timestep 2."""
    moving, still = [0.5, 0, 0, 0, 0, 0, 1], [0.0, 0, 0, 0, 0, 0, 1]
    asked: list[list[int]] = []

    def open_cameras(wanted: list[int]) -> list[Iterator[np.ndarray]]:
        asked.append(wanted)
        cameras = [[np.full((1, 1, 3), 10 * camera + t, np.uint8) for t in wanted] for camera in range(2)]
        return [iter(frames) for frames in cameras]

    trajectory = Trajectory(
        actions=np.array([moving, still, moving], np.float32),
        states=np.arange(4, dtype=np.float32)[:, None],
        instructions=["a", "b", "c"],
        drop_noops=True,
        chunk_offsets=np.arange(2),
        history_offsets=np.array([-1, 0]),
    )
    samples = list(trajectory.samples(open_cameras))
    assert asked == [[0, 1, 2]]
    assert [sample.timestep for sample in samples] == [0, 2]
    assert [sample.instruction for sample in samples] == ["a", "c"]
    assert [sample.state.tolist() for sample in samples if sample.state is not None] == [[0.0], [2.0]]
    assert [[int(image[0, 0, 0]) for image in sample.images] for sample in samples] == [[0, 0, 10, 10], [1, 2, 11, 12]]
    pads = [sample.action_is_pad.tolist() for sample in samples if sample.action_is_pad is not None]
    assert pads == [[False, False], [False, True]]
