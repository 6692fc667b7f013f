"""DeepSpeed's start without torch's compiler."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trainer.engine.zero import compiled_at_first_call

IMPORTED = """
import sys
from trainer.engine.zero import import_muon
import_muon()
from deepspeed.runtime.zero.utils import is_zero_supported_optimizer
assert "deepspeed.runtime.zero.muon.original_muon" in sys.modules
print([name for name in ("torch._inductor", "networkx") if name in sys.modules])
"""


def test_a_function_is_compiled_when_it_is_called_first(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, dict[str, Any]]] = []

    def compile_now(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        compiled.append((function.__name__, options))
        return lambda *arguments: ("compiled", function(*arguments))

    monkeypatch.setattr(torch, "compile", compile_now)
    with compiled_at_first_call():

        @torch.compile
        def twice(number: int) -> int:
            return 2 * number

        @torch.compile(dynamic=True)
        def thrice(number: int) -> int:
            return 3 * number

    assert torch.compile is compile_now
    assert compiled == []
    assert [twice(3), twice(4), thrice(5)] == [("compiled", 6), ("compiled", 8), ("compiled", 15)]
    assert compiled == [("twice", {}), ("thrice", {"dynamic": True})]


@pytest.mark.process
def test_deepspeeds_muon_does_not_import_the_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.strip().splitlines()[-1] == "[]", done.stderr
