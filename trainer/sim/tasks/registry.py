"""Names of tasks -> environments: ours, and those that a user's module registers.

    # my_envs.py, used as: python -m trainer.sim.evaluate --env-module my_envs --task PutOnPlateInScene25Main-v3 ...
    from trainer.sim.tasks.registry import register

    @register("PutOnPlateInScene25Main-v3")
    def make(task: str, rendering: Rendering) -> TaskEnvironment: ...

The module is imported in the evaluator and in each simulator process. A class whose constructor takes (task, rendering) may be
registered as well.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from stoker_proto.errors import ConfigError
from trainer.sim.tasks.interface import Rendering, TaskEnvironment

Factory = Callable[[str, Rendering], TaskEnvironment]
Registered = TypeVar("Registered", bound=Factory)

_SHIPPED = dict.fromkeys(
    ("PushCube-v1", "PickCube-v1", "PullCube-v1", "StackCube-v1", "StackGreenOnRed-v1"),
    "trainer.sim.tasks.shipped:ShippedTask",
)
"""Task -> "module:class", imported when it is made."""
_registered: dict[str, Factory] = {}
_OTHER_INSTRUCTION = {"StackCube-v1": "StackGreenOnRed-v1", "StackGreenOnRed-v1": "StackCube-v1"}
"""Task -> the task that has the same scene for the same seed, and another valid instruction."""


def register(*names: str) -> Callable[[Registered], Registered]:
    """A decorator that registers a factory for these names. Raises ConfigError for a name that is taken."""

    def add(factory: Registered) -> Registered:
        for name in names:
            if name in _SHIPPED or _registered.get(name, factory) is not factory:
                raise ConfigError(f"task {name!r} is registered already; give yours another name")
            _registered[name] = factory
        return factory

    return add


def load_modules(names: Sequence[str]) -> None:
    """Import users' modules, which register their environments. Raises ConfigError."""
    for name in names:
        try:
            importlib.import_module(name)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"--env-module {name}: importing it failed ({type(error).__name__}: {error}); name a module as in "
                "`import my_envs`, that lies in this folder, on PYTHONPATH or among the installed packages"
            ) from error


def task_names() -> list[str]:
    """All known tasks."""
    return [*_SHIPPED, *_registered]


def is_shipped(task: str) -> bool:
    """Whether it is one of ours, which need ManiSkill."""
    return task in _SHIPPED


def is_known(task: str) -> bool:
    """Whether there is an environment of this name."""
    return task in _SHIPPED or task in _registered


def instruction_pairs(tasks: Sequence[str]) -> list[tuple[str, str]]:
    """Those of the tasks that have the same scene for the same seed and different instructions, as pairs in their order."""
    pairs = [(task, _OTHER_INSTRUCTION[task]) for task in tasks if task in _OTHER_INSTRUCTION]
    return [(task, other) for task, other in pairs if other in tasks and tasks.index(task) < tasks.index(other)]


def other_instruction(task: str) -> str:
    """The task that has the same scene for the same seed, and another valid instruction. Raises ConfigError where none is."""
    if task not in _OTHER_INSTRUCTION:
        raise ConfigError(
            f"the scene of {task} has one valid instruction, so there is none to swap it with; tasks that have another: "
            f"{', '.join(_OTHER_INSTRUCTION)}"
        )
    return _OTHER_INSTRUCTION[task]


def check_task(task: str) -> None:
    """Raises ConfigError for an unknown task; the message lists those that are known."""
    if not is_known(task):
        raise ConfigError(
            f"unknown task {task!r}; known: {', '.join(task_names())}; --env-module imports a module that registers others"
        )


def make_task(task: str, rendering: Rendering) -> TaskEnvironment:
    """The environment of a task. Raises ConfigError, or what its factory raises."""
    check_task(task)
    if task in _registered:
        return _registered[task](task, rendering)
    module, _, attribute = _SHIPPED[task].partition(":")
    factory: Factory = getattr(importlib.import_module(module), attribute)
    return factory(task, rendering)
