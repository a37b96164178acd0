"""How well a model predicts given tokens: its losses and its choices, without the logits of a whole sequence.

A long sequence has more logits than memory. A module that offers `token_losses` sees to that itself. Of any other one
the head is looked for: the last linear layer that it calls, whose output is what it returns. While the module runs, the
head is asked for a few thousand tokens at a time, and then for the last one alone; that the module returned just
that is checked each time. Where it does not hold, as with logits that are capped behind the head, all of them are made.
"""

# B batch, N tokens, W width, V vocabulary, C candidates

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lighthouse.evaluation.text import CHUNK, token_losses

# Tokens of the short sequence on which the head is looked for
SHORT = 4


@dataclass(frozen=True)
class Prediction:
    """What a model says of given targets.

    Args:
        losses: `[B, N]` float32, nats.
        is_first: `[B, N]`, whether the target is the most likely token; None where the module gives losses alone.
    """

    losses: Tensor
    is_first: Tensor | None


class Scorer:
    """Asks one module.

    Args:
        module: Offers `token_losses(inputs, targets)`, all `[B, N]`, in nats; or a forward that returns logits
            `[B, N, V]` or an object that has them as `logits`. With both, the forward says what comes next;
            `next_token_logits(inputs)`, `[B, V]`, does so without the logits of all tokens.
        device: Where its inputs go; None: where they are.
    """

    def __init__(self, module: nn.Module, device: torch.device | None = None) -> None:
        self._module, self._device = module, device
        self._head: nn.Linear | None = None
        self._has_looked = False
        # tokens that went through the model
        self.num_tokens = 0

    def losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The cross-entropy of each target: `[B, N]` float32, nats.

        Raises:
            TypeError: The module gives neither losses nor logits.
        """
        if callable(getattr(self._module, "token_losses", None)):
            inputs, targets = self._placed(inputs, targets)
            return token_losses(self._module, inputs, targets)
        return self.predict(inputs, targets).losses

    def predict(self, inputs: Tensor, targets: Tensor) -> Prediction:
        """The losses, and which targets the module would have chosen itself.

        Raises:
            TypeError: The module gives neither losses nor logits.
        """
        if not self._has_logits:
            return Prediction(self.losses(inputs, targets), None)
        inputs, targets = self._placed(inputs, targets)
        if (head := self._find_head(inputs)) is not None:
            losses, firsts = [], []

            def look(x_BNW: Tensor, logits_of: Callable[[Tensor], Tensor]) -> None:
                for x, y in zip(x_BNW.flatten(0, 1).split(CHUNK), targets.flatten().split(CHUNK), strict=True):
                    logits = logits_of(x)
                    losses.append(_cross_entropy(logits, y))
                    firsts.append(logits.argmax(-1) == y)

            if self._run_with_head(head, inputs, look) is not None:
                return Prediction(torch.cat(losses).view_as(targets), torch.cat(firsts).view_as(targets))
        logits_BNV = self._all_logits(inputs)
        rows = list(zip(logits_BNV.flatten(0, 1).split(CHUNK), targets.flatten().split(CHUNK), strict=True))
        found = torch.cat([_cross_entropy(x, y) for x, y in rows]).view_as(targets)
        return Prediction(found, (logits_BNV.argmax(-1) == targets))

    def choices(self, inputs: Tensor, candidates: Tensor) -> Tensor:
        """How likely each candidate is to follow the last input: `[B, C]` float32, logarithms up to a constant.

        Args:
            inputs: `[B, N]`.
            candidates: `[C]` token ids.
        """
        inputs, candidates = self._placed(inputs, candidates)
        if callable(ask := getattr(self._module, "next_token_logits", None)):
            return ask(inputs)[:, candidates].float()
        if not self._has_logits:
            # the losses of one target a sequence: a pass for each candidate
            return torch.stack([self._last_loss(inputs, candidate) for candidate in candidates], dim=1).neg()
        if (head := self._find_head(inputs)) is not None:
            logits = self._run_with_head(head, inputs, lambda x, logits_of: None)
            if logits is not None:
                return logits[:, -1, candidates].float()
        return self._all_logits(inputs)[:, -1, candidates].float()

    @property
    def _has_logits(self) -> bool:
        """Whether the module has a forward of its own; that of a bare LightningModule returns nothing."""
        return _has_forward(self._module)

    def _placed(self, inputs: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        self.num_tokens += inputs.numel()
        return (inputs, others) if self._device is None else (inputs.to(self._device), others.to(self._device))

    def _last_loss(self, inputs: Tensor, candidate: Tensor) -> Tensor:
        targets = torch.cat([inputs[:, 1:], candidate.expand(len(inputs), 1)], dim=1)
        return token_losses(self._module, inputs, targets)[:, -1]

    def _all_logits(self, inputs: Tensor) -> Tensor:
        logits = _logits(output := self._module(inputs))
        if logits is None or logits.ndim != 3 or logits.shape[:2] != inputs.shape:
            name = type(self._module).__name__
            found = f"a tensor {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise TypeError(
                f"LongContextEvaluation needs a {name} with a method token_losses(inputs, targets), all [batch, "
                "tokens], or a forward(inputs) that returns logits [batch, tokens, vocabulary] or an object with such "
                f".logits; forward returned {found}"
            )
        return logits

    def _find_head(self, inputs: Tensor) -> nn.Linear | None:
        """The linear layer that makes the logits, looked for once, on a few tokens; None where there is none.

        Compiled modules are left alone: what is hooked is compiled anew.
        """
        if self._has_looked:
            return self._head
        self._has_looked = True
        parts = list(self._module.modules())
        if any(getattr(part, "_compiled_call_impl", None) or hasattr(part, "_orig_mod") for part in parts):
            return None
        calls: list[tuple[nn.Linear, Tensor]] = []
        linears = [part for part in parts if isinstance(part, nn.Linear)]
        if not linears:
            return None
        hooks = [part.register_forward_hook(lambda part, args, out: calls.append((part, out))) for part in linears]
        try:
            logits = _logits(self._module(inputs[:, :SHORT]))
        finally:
            for hook in hooks:
                hook.remove()
        if calls and logits is not None and _equal(calls[-1][1], logits):
            self._head = calls[-1][0]
        return self._head

    def _run_with_head(
        self, head: nn.Linear, inputs: Tensor, look: Callable[[Tensor, Callable[[Tensor], Tensor]], None]
    ) -> Tensor | None:
        """Run the module; at its head call `look` with what comes in and how to get logits of a part of it.

        Returns:
            The logits of the last token, `[B, 1, V]`; None where the module made something else of the head's output.
        """
        made: list[Tensor] = []

        def enter(part: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            x = args[0]
            if x.shape[:2] != inputs.shape:
                return None
            # here, where a sharded head has all its weights
            look(x, lambda rows: nn.Linear.forward(head, rows))
            return (x[:, -1:], *args[1:])

        hooks = [
            head.register_forward_pre_hook(enter),
            head.register_forward_hook(lambda part, args, out: made.append(out)),
        ]
        try:
            logits = _logits(self._module(inputs))
        except (RuntimeError, IndexError, ValueError):
            # it needs the logits of all tokens
            self._head = None
            return None
        finally:
            for hook in hooks:
                hook.remove()
        if len(made) == 1 and logits is not None and logits.shape[1] == 1 and _equal(made[0], logits):
            return logits
        self._head = None
        return None


def offers_losses(module: nn.Module) -> bool:
    """Whether a module can be asked at all, as far as is seen without asking."""
    return callable(getattr(module, "token_losses", None)) or _has_forward(module)


def _has_forward(module: nn.Module) -> bool:
    forward = type(module).forward
    # by name: there are two packages of Lightning, and this file needs none
    return not (forward.__qualname__ == "LightningModule.forward" or forward is nn.Module.forward)


def _logits(output: Any) -> Tensor | None:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else None


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.equal(one, other.to(one.dtype)))


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, reduction="none").float()
