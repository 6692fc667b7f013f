"""Registers our models with transformers' Auto classes as soon as transformers is imported, without importing it.

    import trainer.models                                    # costs nothing
    from transformers import AutoModelForImageTextToText     # now OpenVLA is known
    model = AutoModelForImageTextToText.from_pretrained("outputs/export")

Importing transformers and torch takes seconds, which a command's `--help` or a loader's test need not wait for. So where
transformers is not imported yet, its import is followed by the registration.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_LIBRARY = "transformers"


def register_models() -> None:
    """Register now where transformers is imported, and after its import otherwise. Again: no effect."""
    if _LIBRARY in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    from trainer.models.openvla.configuration import OpenVLAConfig
    from trainer.models.openvla.modeling import OpenVLAForActionPrediction

    AutoConfig.register(OpenVLAConfig.model_type, OpenVLAConfig, exist_ok=True)
    AutoModelForImageTextToText.register(OpenVLAConfig, OpenVLAForActionPrediction, exist_ok=True)
    # It registers itself at its end. Where it is the one that imports transformers, it is only half there now.
    importlib.import_module("trainer.models.robot.modeling")


class _Finder(MetaPathFinder):
    """Finds transformers where everybody finds it, and has it loaded by a `_Loader`. Removes itself."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """None for all other modules."""
        if name != _LIBRARY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads as the loader that it stands for, and registers afterwards."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """The other's."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """The other's; the module's own loader is as it was when this returns."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()


register_models()
