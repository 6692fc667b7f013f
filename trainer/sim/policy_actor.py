"""A trained policy that acts while demonstrations are collected (DAgger)."""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.policy_io import PolicyInput
from trainer.sim.demonstration import Act
from trainer.sim.environment import FloatArray, Observation


@cache
def load_act(folder: str) -> Act:
    """The policy of an export, loaded once in each process; of each chunk the first action is executed.

    Raises ConfigError, DataError.
    """
    import torch  # seconds of imports that other collections need not wait for

    from trainer.policy import Policy

    torch.set_num_threads(1)
    policy = Policy.load(folder)

    def act(seen: Observation, instruction: str) -> FloatArray:
        images: list[NDArray[Any]] = [one for one in (seen.rgb, seen.depth, seen.wrist_rgb) if one is not None]
        told = PolicyInput(
            images=images,
            instruction=instruction,
            state=seen.state if policy.processor.needs_state else None,
            measurements={name: getattr(seen, name) for name in ("tcp_pose", "intrinsic_cv", "extrinsic_cv")},
        )
        return np.asarray(policy.predict([told])[0].actions[0], np.float64)

    return act
