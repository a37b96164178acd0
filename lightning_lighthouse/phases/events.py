"""What happens to the phases of a run, told to whoever subscribes.

    phase_events(trainer).subscribe(Switch, lambda event: print(event.step))

Who runs the phases publishes the events, and knows none of the listeners; a listener knows nothing of who publishes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Args:
        step: Optimizer steps done.
        phase: The phase that the run is in from now on.
    """

    step: int
    phase: str


@dataclass(frozen=True)
class FitStart(Event):
    """A fit is about to train its first batch; its phases are known."""


@dataclass(frozen=True)
class Switch(Event):
    """The next batch is the first in `phase`. The model still is as it was in the phase before.

    Args:
        before: The phase that ends; also where a resumed run begins with the first batch behind it.
    """

    before: str


@dataclass(frozen=True)
class BatchStart(Event):
    """A training batch begins; the model attends as in `phase`."""


@dataclass(frozen=True)
class BatchEnd(Event):
    """A training batch ended; the model attends densely until the next one.

    Args:
        next_phase: That of the batch to come.
    """

    next_phase: str


@dataclass(frozen=True)
class FitEnd(Event):
    """A fit ended as it should; the model is still patched, and off."""


E = TypeVar("E", bound=Event)


class PhaseEvents:
    """The listeners of one Trainer, by the kind of event."""

    def __init__(self) -> None:
        self._listeners: dict[type[Event], list[Callable[[Any], None]]] = {}

    def subscribe(self, kind: type[E], listener: Callable[[E], None]) -> Callable[[], None]:
        """Let `listener` be called, on every rank, at each event of a kind, after those that subscribed before.

        Returns:
            A function that ends the subscription; harmless when called again.
        """
        # one that subscribes twice is called twice, and each subscription ends by itself
        listeners = self._listeners.setdefault(kind, [])
        entry: Callable[[Any], None] = lambda event: listener(event)  # noqa: E731
        listeners.append(entry)

        def unsubscribe() -> None:
            if entry in listeners:
                listeners.remove(entry)

        return unsubscribe

    def publish(self, event: Event) -> None:
        """Call the listeners of this kind of event, in the order of their subscription; their errors are the fit's."""
        for listener in list(self._listeners.get(type(event), ())):
            listener(event)


_events: WeakKeyDictionary[Any, PhaseEvents] = WeakKeyDictionary()


def phase_events(trainer: Any) -> PhaseEvents:
    """The events of a Trainer's fits; under transformers' Trainer, of the model that it trains.

    Args:
        trainer: Whatever object stands for the training; the events go when it goes.
    """
    return _events.setdefault(trainer, PhaseEvents())
