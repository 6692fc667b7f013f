"""Does a policy fit an environment? Checked at the first view of each episode, before the policy acts in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stoker_proto.errors import ConfigError
from trainer.policy_chunks import check_execute
from trainer.sim.evaluation.episode import Protocol
from trainer.sim.evaluation.simulators import Began

if TYPE_CHECKING:
    from trainer.policy import Policy  # torch: not for the start of the command


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectations:
    """What a policy takes and gives."""

    num_images: tuple[int, int] | None
    """Fewest and most pictures; None: not known."""
    state_width: int | None
    """S: numbers of the state; None: it takes none."""
    action_width: int
    chunk: int
    images_per_frame: int = 1
    """Images that the policy makes of each picture (`data.options.views`)."""

    @classmethod
    def of(cls, policy: Policy) -> Expectations:
        """From the export's stoker_processor.json."""
        processor = policy.processor
        return cls(
            num_images=processor.num_images,
            state_width=processor.state_width,
            action_width=policy.action_width,
            chunk=policy.chunk,
            images_per_frame=processor.images_per_frame,
        )


def make_protocol(
    expected: Expectations,
    *,
    execute: int | None,
    image_history: tuple[int, ...],
    state: str | None,
    max_steps: int | None,
) -> Protocol:
    """How to play with this policy. Raises ConfigError.

    execute: None: the whole chunk.
    """
    executed = check_execute(execute, expected.chunk, "--execute")
    if expected.state_width is None and state is not None:
        raise ConfigError(f"--state {state}: this model was trained without a state (data.state: none); leave it out")
    return Protocol(execute=executed, image_history=image_history, state=state, max_steps=max_steps)


def check_match(expected: Expectations, protocol: Protocol, task: str, began: Began) -> None:
    """Raises ConfigError if the environment shows or takes something else than the policy was trained with."""
    facts = began.facts
    num_images = len(began.view.images) * len(protocol.image_history) * expected.images_per_frame
    if expected.num_images is not None and not expected.num_images[0] <= num_images <= expected.num_images[1]:
        least, most = expected.num_images
        raise ConfigError(
            f"{task}: the model was trained with {least if least == most else f'{least} to {most}'} pictures a timestep, and "
            f"here are {num_images} (cameras {', '.join(facts.cameras)}; {len(protocol.image_history)} moments): take an "
            "environment with the cameras of the training data, and --depth and --image-history as in training"
        )
    if expected.action_width != facts.action_width:
        raise ConfigError(
            f"{task}: the model's actions have {expected.action_width} numbers, and the environment's {facts.action_width} "
            f"({facts.control_mode}): take the control mode of the training data"
        )
    if expected.state_width is None:
        return
    states = {name: len(values) for name, values in began.view.states.items()}
    if states.get(protocol.state or "") != expected.state_width:
        known = ", ".join(f"{name} ({width})" for name, width in states.items()) or "none"
        raise ConfigError(
            f"{task}: the model was trained with a state of {expected.state_width} numbers, and --state is "
            f"{protocol.state or 'not given'}: name the measurement that the training data hold; here are: {known}"
        )
