"""The layers where nothing is said of them: three of windows and one of Lighthouse, counted back from the last."""

from __future__ import annotations

import pytest

from lightning_lighthouse.attention.layer_types import MIXTURE, counted_back, in_words
from lightning_lighthouse.phases.phase import SWITCH_AT, Phase, is_default, phases_asked
from lightning_lighthouse.phases.plan import PhasePlan, phases_begun, resolve_phases
from lightning_lighthouse.phases.schedule import SwitchState

LETTERS = {"window": "w", "lighthouse": "L"}


@pytest.mark.parametrize(
    ("count", "layers"),
    [(1, "L"), (2, "wL"), (3, "wwL"), (4, "wwwL"), (5, "LwwwL"), (6, "wLwwwL"), (7, "wwLwwwL"), (12, "wwwL" * 3)],
)
def test_the_last_layer_is_lighthouse(count, layers):
    assert "".join(LETTERS[layer_type] for layer_type in counted_back(MIXTURE, count)) == layers


def test_its_name_is_that_of_no_other_pattern():
    names = [in_words(counted_back(MIXTURE, count), 512) for count in (2, 4, 5, 6, 7, 30, 32)]
    assert names == [
        "window 512 + lighthouse",
        "window 512 \u00d73 + lighthouse",
        "lighthouse + window 512 \u00d73 + lighthouse",
        "window 512 + lighthouse + window 512 \u00d73 + lighthouse",
        "window 512 \u00d72 + lighthouse + window 512 \u00d73 + lighthouse",
        "window 512 + lighthouse + window 512 \u00d72",
        "window 512 \u00d73 + lighthouse",
    ]


def test_nothing_said_is_the_mixture():
    (phase,) = phases_asked(None, None, None, 0, None)
    assert phase == Phase(SWITCH_AT, ["window", "window", "window", "lighthouse"], window=512)
    assert phase.words == "window 512 \u00d73 + lighthouse"
    (phase,) = phases_asked(7, None, None, 0, None, ("lighthouse",))
    assert phase == Phase(7, ["lighthouse"])


def test_a_window_or_sinks_alone_are_those_of_the_mixture():
    (phase,) = phases_asked(0.5, None, 1024, 4, None, ("window", "lighthouse"))
    assert phase == Phase(0.5, ["window", "lighthouse"], window=1024, sink_tokens=4)
    (phase,) = phases_asked(0.5, None, None, 4, None)
    assert (phase.window, phase.sink_tokens) == (512, 4)
    with pytest.raises(ValueError, match="window is for layer_types 'window' and 'chunk', got 1024 with"):
        # a model of one layer has no window
        phases_asked(0.5, None, 1024, 0, None, ("lighthouse",))
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        phases_asked(0.5, None, 0, 0, None)


def test_what_is_said_is_meant():
    (phase,) = phases_asked(0.5, ["lighthouse"], None, 0, None, MIXTURE)
    assert phase == Phase(0.5, ["lighthouse"])
    with pytest.raises(ValueError, match="window must be given with layer_types 'window'"):
        phases_asked(0.5, ["window", "lighthouse"], None, 0, None)
    asked = [Phase(0.2), Phase(0.9, ["chunk"], window=8)]
    assert phases_asked(None, None, None, 0, asked) == asked
    assert phases_asked(None, None, None, 0, asked)[0].layer_types == ["lighthouse"]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ((None, None, None, 0), True),
        (([Phase(0.5)], None, None, 0), False),
        ((None, ["lighthouse"], None, 0), False),
        ((None, None, 8, 0), False),
        ((None, None, None, 1), False),
    ],
)
def test_it_is_known_whether_something_is_said(said, expected):
    assert is_default(*said) is expected


def saved(*phases: Phase, switched: bool = False) -> PhasePlan:
    planned = resolve_phases(phases, 10)
    return PhasePlan(planned, SwitchState(phases[-1].until, planned[-1].end, switched=switched))


def test_a_run_that_began_with_lighthouse_in_all_layers_keeps_them():
    asked = phases_asked(0.7, None, None, 0, None)
    phases, line = phases_begun(asked, saved(Phase(0.5)))
    assert phases == [Phase(0.7, ["lighthouse"])]
    assert line == (
        "this run began with Lighthouse in all layers, and goes on so instead of with 'window 512 \u00d73 + "
        "lighthouse', the default now: say so with layer_types [lighthouse]"
    )
    # nothing is to be said of what is over
    assert phases_begun(asked, saved(Phase(0.5), switched=True)) == (phases, "")


def test_any_other_run_is_asked_for_the_default():
    asked = phases_asked(0.7, None, None, 0, None)
    for before in (asked[0], Phase(0.5, ["chunk"], window=8), Phase(0.5, ["dense"])):
        assert phases_begun(asked, saved(before)) == (asked, "")
    assert phases_begun(asked, saved(Phase(0.2, ["dense"]), Phase(0.5))) == (asked, "")
    single = phases_asked(0.7, None, None, 0, None, ("lighthouse",))
    assert phases_begun(single, saved(Phase(0.5))) == (single, "")
