"""Stop a training before it takes an optimizer step on a loss or on gradients that are not finite.

One check a step: the device raises a flag for the losses and one for the gradients, the flags are summed over the
ranks, and the host reads the sums right before the optimizer step. Only if one is up, the batch is run again, in eager
code and with hooks on every module, to name the layer where it began.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_lighthouse.checks import is_named
from lightning_lighthouse.training.parallel import first_of_sequence

# Below this loss scale no finite gradient of a sane model overflows float16: the scale is not what is wrong
SMALLEST_LOSS_SCALE = 1.0
# A longer list of ranks does not fit in a line
LISTED_RANKS = 8
# What wrappers put between the names of a model's own modules
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


class NonFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite; every rank raises it, with the same text, before the same step."""


@dataclass
class _Seen:
    """A batch since the last optimizer step, and the losses that it gave."""

    batch: Any
    batch_idx: int
    losses: list[Tensor] = field(default_factory=list)

    def bad_loss(self) -> str:
        """The first loss that is not finite, or nothing."""
        values = (value for loss in self.losses for value in loss.flatten().tolist())
        return next((str(value) for value in values if not math.isfinite(value)), "")


class FiniteGuard:
    """Watches the losses and gradients of each optimizer step.

    Under gradient accumulation it keeps the batches of the step, to find the one that was bad.

    Args:
        enabled: False watches nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        self._enabled = enabled
        self._window: list[_Seen] = []
        self._is_checked = False
        # modules that gave finite values before the first that did not, when the batch was run again
        self._depth = 0

    def start_batch(self, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A batch begins; under manual optimization each stands alone, for a step may never come."""
        if not self._enabled:
            return
        if self._is_checked or not module.automatic_optimization:
            self._window.clear()
            self._is_checked = False
        self._window.append(_Seen(batch, batch_idx))

    def note_loss(self, loss: Tensor) -> None:
        """A loss is about to be propagated back."""
        if self._window:
            self._window[-1].losses.append(loss.detach())

    def clear(self) -> None:
        """Forget the batches of a step that will not come."""
        self._window.clear()

    def check(self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer, phase: str) -> None:
        """Raise unless the losses of this step and the gradients of `optimizer` are finite, on every rank.

        The gradients are those before clipping. What a float16 loss scaler will skip is no fault.

        Args:
            trainer: Its strategy reduces over the ranks; every rank calls this.
            module: The module in training.
            optimizer: About to take its step.
            phase: For the message.

        Raises:
            NonFiniteError: They are not.
        """
        if not self._enabled:
            return
        self._is_checked = True
        device = trainer.strategy.root_device
        losses = [loss for seen in self._window for loss in seen.losses]
        largest = [_largest(losses, device), _largest(_gradients(optimizer, trainer), device)]
        flags = (~torch.isfinite(torch.stack(largest))).float()
        bad_losses, bad_gradients = trainer.strategy.reduce(flags, reduce_op="sum").tolist()
        if bad_losses or bad_gradients:
            raise NonFiniteError(self._explain(trainer, module, bool(bad_losses), phase, largest[1]))

    def _explain(self, trainer: Trainer, module: LightningModule, by_loss: bool, phase: str, largest: Tensor) -> str:
        loss = next(filter(None, (seen.bad_loss() for seen in self._window)), "")
        where = self._locate(trainer, module, by_loss)
        # (what is wrong here, where it began here, after how many modules), for each rank
        found = _gather((loss if by_loss else "", where, self._depth), trainer)
        ranks = [rank for rank, (bad, place, _) in enumerate(found) if bad or (place and not by_loss)]
        # from one rank of a shared sequence it spreads to the others, within a layer
        first = min(ranks, key=lambda rank: found[rank][2]) if ranks else 0
        what = f"loss is {found[first][0]}" if by_loss else f"largest gradient is {largest.item()}"
        if not ranks:
            who = f"rank unknown, all {len(found)} have it after the reduction" if len(found) > 1 else "rank 0"
        else:
            listed = ", ".join(map(str, ranks[:LISTED_RANKS])) + (", .." if len(ranks) > LISTED_RANKS else "")
            who = f"rank {listed} of {len(found)}"
        began = found[first][1] or "the layer is unknown: the same batch, run again, was finite"
        return (
            f"the {what} at step {trainer.global_step}, {phase} phase, {who}: {began}; stopped before the optimizer "
            "step, nothing is saved (stop_on_nonfinite=false turns the check off)"
        )

    def _locate(self, trainer: Trainer, module: LightningModule, by_loss: bool) -> str:
        """Where the first value that is not finite came from on this rank, or nothing."""
        if not module.automatic_optimization:
            # its training_step would take optimizer steps
            return _bad_parameters(module)
        window = self._window
        if by_loss:
            # one repeat on each rank, so that collectives meet: of the bad batch, or of any
            bad = next((index for index, seen in enumerate(window) if seen.bad_loss()), len(window) - 1)
            window = [window[first_of_sequence(trainer, bad)]] if window else []
        try:
            found = [_repeat(trainer, module, seen, backward=not by_loss) for seen in window]
            places = [place for _, place in found]
            self._depth = next((depth for depth, place in found if place), self._depth) if by_loss else 0
        except Exception as error:
            # whatever goes wrong in the repeat, the fault itself must be told
            places = [f"the layer is unknown: running the batch again failed ({type(error).__name__})"]
        return next(filter(None, places), "" if by_loss or trainer.world_size > 1 else _bad_parameters(module))


def _gradients(optimizer: torch.optim.Optimizer, trainer: Trainer) -> list[Tensor]:
    """What this rank holds of the gradients; none where a loss scaler looks after them."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and scaler.is_enabled() and scaler.get_scale() >= SMALLEST_LOSS_SCALE:
        return []
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return [_plain(parameter.grad) for parameter in parameters if parameter.grad is not None]


def _plain(tensor: Tensor) -> Tensor:
    """A tensor's values on this rank: a shard of a sharded one, the values of a sparse one."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local._values() if local.is_sparse else local


def _largest(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The largest magnitude, which is NaN if one is: unlike a sum of squares it never overflows."""
    filled = [tensor.detach() for tensor in tensors if tensor.numel()]
    return torch.nn.utils.get_total_norm(filled, math.inf).to(device, torch.float32)


def _bad_parameters(module: nn.Module) -> str:
    bad = [name for name, p in module.named_parameters() if p.grad is not None and not _is_finite(p.grad)]
    more = f" and {len(bad) - 1} other parameters" if len(bad) > 1 else ""
    return f"in the gradient of {_name(bad[0])}{more}" if bad else ""


def _repeat(trainer: Trainer, module: LightningModule, seen: _Seen, *, backward: bool) -> tuple[int, str]:
    """Run a batch again and return where the first value that is not finite arose, after how many modules; or ""."""
    if not all(_is_finite(tensor) for tensor in _tensors(seen.batch)):
        return 0, "in the batch itself"
    parameters = inspect.signature(module.training_step).parameters
    if "dataloader_iter" in parameters:
        return 0, "the layer is unknown: training_step takes the batches itself"
    taken = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters.values())
    has_more = any(p.kind == p.VAR_POSITIONAL for p in parameters.values())
    arguments = [seen.batch, seen.batch_idx][: 2 if has_more else taken]
    trace = _Trace()
    # Any: its class is known by name alone
    strategy: Any = trainer.strategy
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.set_grad_enabled(backward))
        if is_named(strategy, "ParallelStrategy"):
            stack.enter_context(strategy.block_backward_sync())
        stack.enter_context(trace.watch(module, backward=backward))
        stack.callback(reshard, module)
        output = strategy.training_step(*arguments)
        loss = output["loss"] if isinstance(output, Mapping) else output
        assert isinstance(loss, Tensor)
        if backward and not trace.place and loss.requires_grad:
            loss.backward()
    if trace.place or _is_finite(loss):
        return trace.depth, trace.place
    return trace.depth, "in the loss itself, all modules returned finite values"


class _Trace:
    """Hooks that note the first module or parameter with a value that is not finite."""

    def __init__(self) -> None:
        self.place = ""
        # modules that came before
        self.depth = 0
        # the module whose gradient came last in the backward pass
        self._behind = ""

    def watch(self, module: nn.Module, *, backward: bool) -> ExitStack:
        """Hook every module, and for the backward pass every parameter; the hooks go with the returned context."""
        hooks = ExitStack()
        for name, child in module.named_modules():
            shown = _name(name) or type(module).__name__
            hook = partial(self._on_output, shown, backward)
            hooks.callback(child.register_forward_hook(hook, with_kwargs=True).remove)
        if backward:
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    hooks.callback(parameter.register_hook(partial(self._on_parameter, _name(name))).remove)
        return hooks

    def _on_output(
        self, name: str, backward: bool, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any
    ) -> None:
        outputs = list(_tensors(output))
        # a module runs before the ones that hold it are done: the innermost is first
        if not self.place and not all(map(_is_finite, outputs)) and all(map(_is_finite, _tensors((args, kwargs)))):
            self.place = f"first in the output of {name}"
        self.depth += not self.place
        if backward:
            for tensor in outputs:
                if tensor.requires_grad:
                    tensor.register_hook(partial(self._on_gradient, name))

    def _on_gradient(self, name: str, gradient: Tensor) -> None:
        if self.place:
            return
        if _is_finite(gradient):
            self._behind = name
        else:
            behind = f"the backward pass of {self._behind}" if self._behind else "the gradient of the loss"
            self.place = f"first in {behind}"

    def _on_parameter(self, name: str, gradient: Tensor) -> None:
        if not self.place and not _is_finite(gradient):
            self.place = f"first in the gradient of {name}"


def reshard(module: nn.Module) -> None:
    """Leave the weights as a whole step would: FSDP2 keeps some gathered from a forward pass to its backward pass."""
    from torch.distributed.fsdp import FSDPModule

    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()


def _name(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(_plain(tensor.detach())).all())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested containers that can hold a value that is not finite."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _tensors(item)


def _gather(found: tuple[str, str, int], trainer: Trainer) -> list[tuple[str, str, int]]:
    """What every rank found, on every rank."""
    if trainer.world_size == 1 or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [found]
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, found)
    return gathered


def restart_spike_detection(callbacks: Sequence[Any]) -> bool:
    """Empty the windows of Lightning's SpikeDetection, whose mean is that of another phase's losses.

    Returns:
        Whether there is one.
    """
    detectors = [callback for callback in callbacks if is_named(callback, "SpikeDetection")]
    for detector in detectors:
        detector.running_mean.reset()
    return bool(detectors)
