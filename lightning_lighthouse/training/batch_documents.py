"""The documents of every batch of a Trainer, whatever trains it: read before the step that gets the batch.

Lightning hands a batch to the strategy twice, to move it to the device and to run a step of the module on it. Both are
listened to there, and not in hooks of a callback, so that the trials of a search for the learning rate, which runs
without callbacks, are seen too. What is still in host memory before the move is read there, and costs no wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.phases.events import BatchEnd, FitEnd, phase_events
from lightning_lighthouse.routing.given_documents import documents_of_prompt, require_documents
from lightning_lighthouse.routing.packing import DocumentsSetting, PackingCheck, told
from lightning_lighthouse.routing.patch import Patch, patch_attention

TRAINING = "training_step"
PREDICTION = "predict_step"
STEPS = (TRAINING, "validation_step", "test_step", PREDICTION)
MOVE = "batch_to_device"
# Hooks that may make another batch of it while it is moved
CHANGES = ("transfer_batch_to_device", "on_after_batch_transfer")


class Settings(Protocol):
    """What `LighthouseCallback` is told of documents, and of the layers that must heed them."""

    attention: LighthouseConfig
    select: str | None
    documents: DocumentsSetting


@contextmanager
def watched_batches(
    trainer: Trainer, module: LightningModule, settings: Settings, patch: Patch | None
) -> Iterator[None]:
    """Do with the documents of each batch, inside, as was said: keep attention within them, or refuse such batches.

    Args:
        trainer: Its strategy runs the steps.
        module: In training, validation, test or prediction.
        settings: Of the callback.
        patch: Of the module. None: it is patched at the first step if documents are to be kept, with no layer routed.
    """
    batches = _Batches(trainer, module)
    with ExitStack() as contexts:
        contexts.enter_context(told(module, settings.documents))
        if settings.documents is False:
            check = PackingCheck()
            contexts.callback(check.forget)
            events = phase_events(trainer)
            # who has waited for the losses of a step, as FiniteGuard does, has its verdict then
            contexts.callback(events.subscribe(BatchEnd, lambda event: check.read()))
            contexts.callback(events.subscribe(FitEnd, lambda event: check.finish()))
            around: _Around = lambda name, batch: _looked_at(check, batches.whole(batch))  # noqa: E731
        elif settings.documents is True:
            keeper = contexts.enter_context(_keeper(trainer, module, settings, patch))
            around = lambda name, batch: keeper.inside(name, batches.whole(batch))  # noqa: E731
        else:
            yield
            return
        contexts.enter_context(_around_steps(trainer.strategy, batches.keep, around))
        yield


# Given the name of a step and its batch
_Around = Callable[[str, Any], AbstractContextManager[None]]


@contextmanager
def _looked_at(check: PackingCheck, batch: Any) -> Iterator[None]:
    check.look(batch)
    yield


@contextmanager
def _keeper(
    trainer: Trainer, module: LightningModule, settings: Settings, patch: Patch | None
) -> Iterator[_DocumentKeeper]:
    keeper = _DocumentKeeper(module, settings, patch)
    unsubscribe = phase_events(trainer).subscribe(BatchEnd, lambda event: keeper.clear())
    try:
        yield keeper
    finally:
        unsubscribe()
        keeper.close()


class _DocumentKeeper:
    """Sets the documents of each batch, and sees to it that the first of each kind was heeded by every layer."""

    def __init__(self, module: LightningModule, settings: Settings, patch: Patch | None) -> None:
        self._module, self._settings, self._patch = module, settings, patch
        self._is_own = patch is None
        self._checked: set[bool] = set()

    @contextmanager
    def inside(self, step: str, batch: Any) -> Iterator[None]:
        """Documents hold within a step; those of a training batch until it has ended, its backward included."""
        documents = (documents_of_prompt if step == PREDICTION else require_documents)(self._module, batch)
        if documents is None:
            yield
            return
        patch, trains = self._patched(), step == TRAINING
        patch.set_documents(documents)
        if trains not in self._checked:
            patch.documents.audit()
        try:
            yield
            # a batch that a step passes over tells nothing
            if trains not in self._checked and patch.documents.check():
                self._checked.add(trains)
        finally:
            if not trains:
                patch.set_documents(None)

    def _patched(self) -> Patch:
        """Not before the first step: by then the model is built, wrapped and sharded, whatever runs it."""
        if self._patch is None:
            settings = self._settings
            try:
                self._patch = patch_attention(self._module, settings.attention, select=settings.select, documents=True)
            except ValueError as error:
                raise SettingError(str(error)) from None
        return self._patch

    def clear(self) -> None:
        """A batch has ended."""
        if self._patch is not None and self._patch.is_patched:
            self._patch.set_documents(None)

    def close(self) -> None:
        """Leave the module as it was, or to whom it is patched for."""
        self.clear()
        if self._is_own and self._patch is not None:
            self._patch.restore()


class _Batches:
    """The batch as it was on the host, kept from its move to its step."""

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer, self._module = trainer, module
        self._host: Any = None
        self._moved: Any = None

    def keep(self, host: Any, moved: Any) -> None:
        """A batch was moved."""
        self._host, self._moved = host, moved

    def _taken(self, batch: Any) -> Any:
        """The batch on the host, or None where it is not known to be the same."""
        host, moved, self._host, self._moved = self._host, self._moved, None, None
        return None if moved is not batch or self._is_changed_on_the_way() else host

    def whole(self, batch: Any) -> Any:
        """The batch, in host memory as far as it is known there."""
        host = self._taken(batch)
        if isinstance(batch, Mapping) and isinstance(host, Mapping):
            return {name: value if _is_new(value, host.get(name)) else host[name] for name, value in batch.items()}
        return batch if host is None else host

    def _is_changed_on_the_way(self) -> bool:
        owners = (self._module, getattr(self._trainer, "datamodule", None))
        return any(_is_users(getattr(type(owner), hook, None)) for owner in owners for hook in CHANGES)


def _is_users(hook: Any) -> bool:
    """Whether a hook is not Lightning's own; by the name of its module, for Lightning has two."""
    return hook is not None and hook.__module__.split(".")[0] not in ("lightning", "pytorch_lightning")


def _is_new(value: Any, before: Any) -> bool:
    """Whether a hook has put a value into the batch, or another in the place of the one before."""
    if isinstance(value, Tensor):
        return not (isinstance(before, Tensor) and before.shape == value.shape)
    return before is None


@contextmanager
def _around_steps(strategy: Any, moved: Callable[[Any, Any], None], around: _Around) -> Iterator[None]:
    """Call `moved(host, device)` when a batch has been moved, and run each step on one inside `around(step, batch)`."""
    own = {name: value for name, value in vars(strategy).items() if name in (MOVE, *STEPS)}
    move = getattr(strategy, MOVE)

    def batch_to_device(batch: Any, *args: Any, **kwargs: Any) -> Any:
        out = move(batch, *args, **kwargs)
        moved(batch, out)
        return out

    def heard(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def run(batch: Any, *args: Any, **kwargs: Any) -> Any:
            with around(name, batch):
                return step(batch, *args, **kwargs)

        return run

    listening = {MOVE: batch_to_device, **{name: heard(name, getattr(strategy, name)) for name in STEPS}}
    vars(strategy).update(listening)
    try:
        yield
    finally:
        for name, listener in listening.items():
            if vars(strategy).get(name) is listener:
                del vars(strategy)[name]
        vars(strategy).update(own)
