"""The loss without the matrix of logits: the head computes some labels' logits at a time, and again for the gradient.

    hidden [B, P, H] -> those with a label [N, H] -> per chunk of n: logits [n, V] -> losses [n]      (forward)
                                                  -> per chunk of n: logits [n, V] -> gradients       (backward)

One chunk of logits lives at a time; the whole would be N * V numbers, several times over (float32 copy, softmax, gradient). The
second computation costs a third more of the head's arithmetic.

The model runs as ever, but for this one forward its head returns losses instead of logits. So all that DeepSpeed does around the
head (ZeRO-3 gathers its weights before forward and before backward) happens once per micro-batch, with or without chunks. Some
ranks may use chunks and others not. A model may change logits behind its head (Gemma caps them, Granite divides them). A
comparison of both at the start finds this.

Letters of shapes: B rows, P positions, N labels, n labels of a chunk, H width, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trainer.losses.interface import TokenLoss
from trainer.training.loss import nll_of_tokens

log = logging.getLogger(__name__)

Finish = Callable[[Tensor], Tensor]
"""What the model does to the head's output before it returns it as logits."""


@dataclass(kw_only=True)
class Part:
    """One micro-batch's labels, and what the head found for them."""

    columns: Tensor
    """int64[N]: where each label's hidden state stands in the head's input float[B', T, H], seen as float[B' * T, H]."""
    targets: Tensor
    """int64[N]."""
    loss: TokenLoss | None
    """What is minimised; None: the NLL."""
    nll: Tensor = field(init=False)
    """float32[N], without gradient."""
    correct: Tensor = field(init=False)
    """bool[N]: whether the target has the largest logit."""
    losses: list[Tensor] = field(default_factory=list)
    """float32[N] of each call of the head, behind DeepSpeed's hooks. One call is expected."""


class ChunkedHead:
    """A model's head that can return losses."""

    def __init__(self, head: torch.nn.Module, finish: Finish, size: int) -> None:
        """size: labels of a chunk."""
        self.head, self.finish, self.size = head, finish, size

    @contextmanager
    def returning_losses(self, part: Part) -> Iterator[None]:
        """Inside, the head returns `part`'s losses float32[1, N, 1] in place of logits, and fills `part`."""

        def forward(hidden: Tensor) -> Tensor:
            chosen = hidden.flatten(0, 1).index_select(0, part.columns)
            bias, pairs = terms_of(self.head, chosen)
            losses: Tensor = _LossOfChunks.apply(self, part, bias, *pairs)  # type: ignore[no-untyped-call]
            return losses.view(1, -1, 1)

        def keep(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
            part.losses.append(output.view(-1))

        hook = self.head.register_forward_hook(keep)  # behind DeepSpeed's hooks, which were there before
        self.head.__dict__["forward"] = forward
        try:
            yield
        finally:
            del self.head.__dict__["forward"]
            hook.remove()

    def logits(self, bias: Tensor | None, pairs: tuple[Tensor, ...]) -> Tensor:
        """float32[n, V] of `terms_of`."""
        found = functional.linear(pairs[0], pairs[1], bias)
        for hidden, weight in zip(pairs[2::2], pairs[3::2], strict=True):
            found = found + functional.linear(hidden, weight)
        return self.finish(found).float()


def chunkable(head: torch.nn.Module | None) -> bool:
    """Whether `terms_of` knows this kind of head: a linear layer, perhaps with one plain adapter."""
    if type(head) is torch.nn.Linear:
        return True
    names = tuple(getattr(head, "lora_A", ()))
    plain = not getattr(head, "lora_variant", None) and not any(getattr(head, "lora_bias", {}).values())
    return type(getattr(head, "base_layer", None)) is torch.nn.Linear and len(names) == 1 and plain


def terms_of(head: torch.nn.Module, hidden: Tensor) -> tuple[Tensor | None, list[Tensor]]:
    """(bias, [input, weight, ...]): logits are the sum of input @ weight.T, plus bias. hidden: float[N, H]."""
    if type(head) is torch.nn.Linear:
        return head.bias, [hidden, head.weight]
    layer: Any = head
    (name,) = layer.lora_A
    low: Tensor = layer.lora_A[name](layer.lora_dropout[name](hidden)) * layer.scaling[name]
    return layer.base_layer.bias, [hidden, layer.base_layer.weight, low, layer.lora_B[name].weight]


class _LossOfChunks(torch.autograd.Function):
    """losses float32[N] of (bias, [input, weight, ...])."""

    @staticmethod
    def forward(ctx: Any, head: ChunkedHead, part: Part, bias: Tensor | None, *pairs: Tensor) -> Tensor:
        ctx.head, ctx.part = head, part
        ctx.save_for_backward(bias, *pairs)
        losses, nll, correct = [], [], []
        for begin in range(0, len(part.targets), head.size):
            chosen = slice(begin, begin + head.size)
            targets = part.targets[chosen]
            logits = head.logits(bias, _cut(pairs, chosen))
            nll.append(_token_losses(None, logits, targets))
            losses.append(nll[-1] if part.loss is None else _token_losses(part.loss, logits, targets))
            correct.append(logits.argmax(dim=-1) == targets)
        part.nll, part.correct = torch.cat(nll), torch.cat(correct)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        head, part = ctx.head, ctx.part
        bias, *pairs = ctx.saved_tensors
        wanted: list[bool] = list(ctx.needs_input_grad[2:])
        # Summed over the chunks in float32: sums of many bf16 chunks would lose digits that one product of all keeps.
        sums: list[Tensor | None] = [
            torch.zeros(t.shape, dtype=torch.float32, device=t.device) if w and n % 2 == 0 else None
            for n, (t, w) in enumerate(zip((bias, *pairs), wanted, strict=True))
        ]
        rows: list[list[Tensor]] = [[] for _ in wanted]
        for begin in range(0, len(part.targets), head.size):
            chosen = slice(begin, begin + head.size)
            leaves = [t.detach().requires_grad_(w) for t, w in zip(_cut(tuple(pairs), chosen), wanted[1:], strict=True)]
            own_bias = None if bias is None else bias.detach().requires_grad_(wanted[0])
            with torch.enable_grad():
                logits = head.logits(own_bias, tuple(leaves))
                losses = _token_losses(part.loss, logits, part.targets[chosen])
            every = (own_bias, *leaves)
            numbers = [n for n, w in enumerate(wanted) if w]
            found = torch.autograd.grad(losses, [t for n in numbers if (t := every[n]) is not None], gradient[chosen])
            del logits, losses  # before the next chunk's are made
            for n, grad in zip(numbers, found, strict=True):
                total = sums[n]
                if total is None:
                    rows[n].append(grad)
                else:
                    total += grad
        grads: list[Tensor | None] = []
        for total, parts, tensor in zip(sums, rows, (bias, *pairs), strict=True):
            grads.append(total.to(tensor.dtype) if total is not None else torch.cat(parts) if parts else None)
        return None, None, *grads


def _cut(pairs: tuple[Tensor, ...], chosen: slice) -> tuple[Tensor, ...]:
    """The same with a chunk of each input."""
    return tuple(tensor if n % 2 else tensor[chosen] for n, tensor in enumerate(pairs))


def _token_losses(loss: TokenLoss | None, logits: Tensor, targets: Tensor) -> Tensor:
    found = nll_of_tokens(logits[None], targets[None]) if loss is None else loss(logits[None], targets[None])
    return found[0]


def unchanged(logits: Tensor) -> Tensor:
    """The `Finish` of most models."""
    return logits


def capped(cap: float) -> Finish:
    """The `Finish` of Gemma."""

    def finish(logits: Tensor) -> Tensor:
        return torch.tanh(logits / cap) * cap

    return finish


def multiplied(factor: float) -> Finish:
    """The `Finish` of Cohere."""

    def finish(logits: Tensor) -> Tensor:
        return logits * factor

    return finish


def divided(divisor: float) -> Finish:
    """The `Finish` of Granite."""

    def finish(logits: Tensor) -> Tensor:
        return logits / divisor

    return finish


_FINISHES: dict[str, Callable[[float], Finish]] = {
    "final_logit_softcapping": capped,
    "logit_scale": multiplied,
    "lm_head_multiplier": multiplied,
    "output_multiplier": multiplied,
    "logits_scaling": divided,
}
"""Key of a model's config -> what such models do to logits."""


PROBED_DEVIATION = 100.0
"""Standard deviation of the head's output that a `Finish` is found with: large enough that a cap of 30 or 50 shows."""


@contextmanager
def loud_head(head: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the head's output is multiplied up to PROBED_DEVIATION, and kept in the list."""
    kept: list[Tensor] = []

    def amplify(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
        kept.append((output.float() * (PROBED_DEVIATION / output.float().std())).to(output.dtype))
        return kept[-1]

    hook = head.register_forward_hook(amplify)
    try:
        yield kept
    finally:
        hook.remove()


def find_finish(model_config: Any, head_output: Tensor, logits: Tensor) -> Finish | None:
    """What makes `logits` of `head_output`, both float[B, T, V]; None if nothing that is known does."""
    text = model_config.get_text_config()
    known = [
        make(float(v)) for name, make in _FINISHES.items() if isinstance(v := getattr(text, name, None), float | int)
    ]
    if head_output.shape != logits.shape:
        return None
    tolerance = 1e-5 if logits.dtype == torch.float32 else 2e-2
    for finish in (unchanged, *known):
        difference = (finish(head_output).float() - logits.float()).abs().max()
        if bool(difference <= tolerance * logits.float().std()):
            return finish
    return None
