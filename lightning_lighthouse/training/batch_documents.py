"""The documents of every batch of a Trainer, whatever trains it: looked at before the step that gets the batch.

Lightning hands a batch to the strategy twice, to move it to the device and to run a step of the module on it. Both are
listened to there, and not in hooks of a callback, so that the trials of a search for the learning rate, which runs
without callbacks, are seen too. What is still in host memory before the move is read there, and costs no wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_lighthouse.phases.events import FitEnd, phase_events
from lightning_lighthouse.routing.packing import DocumentsSetting, PackingCheck, told

STEPS = ("training_step", "validation_step", "test_step")
MOVE = "batch_to_device"
# Hooks that may make another batch of it while it is moved
CHANGES = ("transfer_batch_to_device", "on_after_batch_transfer")


@contextmanager
def watched_batches(trainer: Trainer, module: LightningModule, documents: DocumentsSetting) -> Iterator[None]:
    """Look at each batch that the Trainer runs a step on inside.

    Args:
        trainer: Its strategy runs the steps.
        module: In training.
        documents: What the user has said of them; False refuses a batch that packs several.
    """
    check = PackingCheck()
    batches = _Batches(trainer, module)

    def before_step(batch: Any) -> None:
        if documents is False:
            for part in batches.parts(batch):
                check.look(part)

    unsubscribe = phase_events(trainer).subscribe(FitEnd, lambda event: check.finish())
    try:
        with told(module, documents), _before_steps(trainer.strategy, batches.keep, before_step):
            yield
    finally:
        unsubscribe()
        check.forget()


class _Batches:
    """The batch as it was on the host, kept from its move to its step."""

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer, self._module = trainer, module
        self._host: Any = None
        self._moved: Any = None

    def keep(self, host: Any, moved: Any) -> None:
        """A batch was moved."""
        self._host, self._moved = host, moved

    def parts(self, batch: Any) -> list[Any]:
        """What to look at: the batch where it still is in host memory, and what has come to it since."""
        host, moved, self._host, self._moved = self._host, self._moved, None, None
        if host is None or moved is not batch or self._is_changed_on_the_way():
            return [batch]
        if isinstance(batch, Mapping) and isinstance(host, Mapping):
            return [host, {name: value for name, value in batch.items() if _is_new(value, host.get(name))}]
        return [host]

    def _is_changed_on_the_way(self) -> bool:
        data = getattr(self._trainer, "datamodule", None)
        return any(
            is_overridden(hook, owner) for owner in (self._module, data) if owner is not None for hook in CHANGES
        )


def _is_new(value: Any, before: Any) -> bool:
    """Whether a hook has put a value into the batch, or another in the place of the one before."""
    return isinstance(value, Tensor) and not (isinstance(before, Tensor) and before.shape == value.shape)


@contextmanager
def _before_steps(
    strategy: Any, moved: Callable[[Any, Any], None], before_step: Callable[[Any], None]
) -> Iterator[None]:
    """Call `moved(host, device)` when a batch has been moved, and `before_step(batch)` before each step on one."""
    own = {name: value for name, value in vars(strategy).items() if name in (MOVE, *STEPS)}
    move = getattr(strategy, MOVE)

    def batch_to_device(batch: Any, *args: Any, **kwargs: Any) -> Any:
        out = move(batch, *args, **kwargs)
        moved(batch, out)
        return out

    def heard(step: Callable[..., Any]) -> Callable[..., Any]:
        def run(batch: Any, *args: Any, **kwargs: Any) -> Any:
            before_step(batch)
            return step(batch, *args, **kwargs)

        return run

    listening = {MOVE: batch_to_device, **{name: heard(getattr(strategy, name)) for name in STEPS}}
    vars(strategy).update(listening)
    try:
        yield
    finally:
        for name, listener in listening.items():
            if vars(strategy).get(name) is listener:
                del vars(strategy)[name]
        vars(strategy).update(own)
