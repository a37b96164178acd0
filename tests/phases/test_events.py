"""Phase events: who subscribed hears them, in order, until it does not want to."""

from __future__ import annotations

import gc
import weakref

from lightning_lighthouse.phases import BatchEnd, BatchStart, PhaseEvents, Switch, phase_events


class Training:
    """Stands for a training, as a Trainer does."""


def test_listeners_hear_their_kind_of_event_in_the_order_of_subscription():
    events, heard = PhaseEvents(), []
    events.subscribe(Switch, lambda event: heard.append(("first", event.step, event.before)))
    events.subscribe(Switch, lambda event: heard.append(("second", event.step, event.phase)))
    events.publish(BatchStart(6, "dense"))
    events.publish(Switch(7, "dense", "lighthouse"))
    assert heard == [("first", 7, "lighthouse"), ("second", 7, "dense")]


def test_a_subscription_ends_alone_and_twice_without_harm():
    events, heard = PhaseEvents(), []
    first, second = (events.subscribe(BatchEnd, heard.append) for _ in range(2))
    first()
    first()
    events.publish(BatchEnd(1, "lighthouse", "dense"))
    assert heard == [BatchEnd(1, "lighthouse", "dense")]
    second()
    events.publish(BatchEnd(2, "dense", "dense"))
    assert len(heard) == 1


def test_a_listener_that_leaves_while_it_is_called_keeps_the_others_in_place():
    events, heard = PhaseEvents(), []
    leave = events.subscribe(BatchStart, lambda event: (heard.append("once"), leave()))
    events.subscribe(BatchStart, lambda event: heard.append("always"))
    for step in range(2):
        events.publish(BatchStart(step, "dense"))
    assert heard == ["once", "always", "always"]


def test_each_training_has_its_own_events_and_they_go_with_it():
    one, other = Training(), Training()
    assert phase_events(one) is phase_events(one)
    assert phase_events(one) is not phase_events(other)
    gone = weakref.ref(one)
    phase_events(one).subscribe(Switch, print)
    del one
    gc.collect()
    assert gone() is None
