"""The documents of every batch of a Trainer, whatever trains it: read before the step that gets the batch.

Lightning hands a batch to the strategy twice, to move it to the device and to run a step of the module on it. Both are
listened to there, and not in hooks of a callback, so that the trials of a search for the learning rate, which runs
without callbacks, are seen too. What is still in host memory before the move is read there, and costs no wait. A step
that fetches its batches by itself, `training_step(dataloader_iter)`, is listened to as it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import copy
from dataclasses import is_dataclass
from functools import partial
from typing import Any, Protocol

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.checks import SettingError, is_named
from lightning_lighthouse.phases.events import BatchEnd, FitEnd, phase_events
from lightning_lighthouse.routing.given_documents import documents_of_prompt, require_documents
from lightning_lighthouse.routing.packing import DocumentsSetting, PackingCheck, by_name, told, version_of
from lightning_lighthouse.routing.patch import Patch, patch_attention
from lightning_lighthouse.runs.stand_in import StandIn

TRAINING = "training_step"
PREDICTION = "predict_step"
STEPS = (TRAINING, "validation_step", "test_step", PREDICTION)
MOVE = "batch_to_device"
# Hooks that may make another batch of it while it is moved
CHANGES = ("transfer_batch_to_device", "on_after_batch_transfer")
# What Lightning hands to a step that asks for `dataloader_iter`
FETCHER = "_DataFetcherWrapper"


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
            patch.documents.audit(may_rest=not trains)
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
        # each tensor that was moved, which lives as long as its address is asked for; its version; the one on the host
        self._hosts: dict[int, tuple[Tensor, int, Tensor]] = {}

    def keep(self, host: Any, moved: Any) -> None:
        """A batch was moved."""
        before, after = list(_tensors_in(host)), list(_tensors_in(moved))
        is_same = [tensor.shape for tensor in before] == [tensor.shape for tensor in after]
        pairs = zip(before, after, strict=True) if is_same and not self._is_changed_on_the_way() else ()
        self._hosts = {id(new): (new, version_of(new), old) for old, new in pairs if old is not new}

    def whole(self, batch: Any) -> Any:
        """The batch, in host memory as far as it is known there; what a hook has put into it since is as it is."""
        hosts, self._hosts = self._hosts, {}
        return _replaced(batch, hosts) if hosts else batch

    def _is_changed_on_the_way(self) -> bool:
        owners = (self._module, getattr(self._trainer, "datamodule", None))
        return any(_is_users(getattr(type(owner), hook, None)) for owner in owners for hook in CHANGES)


def _is_users(hook: Any) -> bool:
    """Whether a hook is not Lightning's own; by the name of its module, for Lightning has two."""
    return hook is not None and hook.__module__.split(".")[0] not in ("lightning", "pytorch_lightning")


def _tensors_in(batch: Any) -> Iterator[Tensor]:
    """Every tensor in a batch, in an order that its copies have too."""
    if isinstance(batch, Tensor):
        yield batch
        return
    named = by_name(batch)
    for value in named.values() if named is not None else batch if isinstance(batch, list | tuple) else ():
        # as far as Lightning moves them
        if isinstance(value, Tensor | Mapping | list | tuple) or is_dataclass(value):
            yield from _tensors_in(value)


def _replaced(batch: Any, hosts: Mapping[int, tuple[Tensor, int, Tensor]]) -> Any:
    """The batch with the tensors on the host in the places of those that were moved and have not changed since."""
    if isinstance(batch, Tensor):
        moved, version, host = hosts.get(id(batch), (None, 0, batch))
        return host if moved is batch and version_of(batch) == version else batch
    if isinstance(batch, Mapping):
        return {name: _replaced(value, hosts) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        values = [_replaced(value, hosts) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_asdict") else type(batch)(values)
    if not is_dataclass(batch):
        return batch
    out = copy(batch)
    for name, value in (by_name(batch) or {}).items():
        # frozen ones too
        object.__setattr__(out, name, _replaced(value, hosts))
    return out


class _Fetched(Iterator[Any]):
    """What Lightning hands to a step that fetches its batches: each is listened to from then on, to the step's end."""

    def __init__(self, items: Iterator[Any], around: Callable[[Any], AbstractContextManager[None]]) -> None:
        self._items, self._around = items, around
        self.contexts = ExitStack()

    def __next__(self) -> Any:
        item = next(self._items)
        # the batch, its number and that of its loader
        self.contexts.enter_context(self._around(item[0]))
        return item

    def __getattr__(self, name: str) -> Any:
        return getattr(self._items, name)


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
            if is_named(batch, FETCHER):
                fetched = _Fetched(batch, partial(around, name))
                with fetched.contexts:
                    return step(fetched, *args, **kwargs)
            with around(name, batch):
                return step(batch, *args, **kwargs)

        return StandIn(step, run)

    listening = {MOVE: StandIn(move, batch_to_device), **{name: heard(name, getattr(strategy, name)) for name in STEPS}}
    vars(strategy).update(listening)
    try:
        yield
    finally:
        for name, listener in listening.items():
            if vars(strategy).get(name) is listener:
                del vars(strategy)[name]
        vars(strategy).update(own)
