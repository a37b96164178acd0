"""A phase of a run as the user writes it, and its name in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, cast

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.attention.layer_types import (
    DENSE,
    MIXTURE,
    MIXTURE_WINDOW,
    WINDOW,
    check_layer_types,
    in_words,
)
from lightning_lighthouse.checks import check_type, quoted
from lightning_lighthouse.phases.schedule import check_switch_at

LayerType = Literal["lighthouse", "window", "chunk", "dense"]


@dataclass(frozen=True)
class Phase:
    """A part of a run in which the attention layers attend in one way.

    Args:
        until: Where it ends: an int is the first optimizer step behind it, a float above 0 and up to 1.0 a fraction of
            the training's steps, rounded up.
        layer_types: How the attention layers attend, in the order of the forward pass: "lighthouse", "window" (each
            token sees itself and the `window - 1` before it), "chunk" (blocks of `window` tokens that do not see each
            other; positions go on) or "dense". One for each layer, or a pattern that is repeated over them; as a phase
            says none, Lighthouse in all.
        window: Tokens, for "window" and "chunk".
        sink_tokens: First tokens of the sequence that stay visible to every token of a "window" layer.
        attention: Settings of Lighthouse Attention in this phase; None: those of the callback.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range, is missing, or is used by none of the types.
    """

    until: int | float
    layer_types: list[LayerType] = field(default_factory=lambda: ["lighthouse"])
    window: int | None = None
    sink_tokens: int = 0
    attention: LighthouseConfig | None = None

    def __post_init__(self) -> None:
        check_switch_at(self.until, "until")
        check_layer_types(self.layer_types, self.window, self.sink_tokens)
        check_type("attention", self.attention, LighthouseConfig | None)

    @property
    def words(self) -> str:
        """The pattern, as in "window 512 \u00d73 + lighthouse"."""
        return in_words(self.layer_types, self.window, self.sink_tokens)


# Where nothing else is said: of the best rows at 98,304 tokens (docs/numbers/settings.md)
SWITCH_AT = 0.9


def phases_asked(
    switch_at: int | float | None,
    layer_types: Sequence[LayerType] | None,
    window: int | None,
    sink_tokens: int,
    phases: Sequence[Phase] | None,
    default_types: Sequence[str] = MIXTURE,
) -> list[Phase]:
    """The phases before the dense one, from one of the two forms of the settings.

    Args:
        switch_at: The short form: the end of the only phase; None: SWITCH_AT of the steps.
        layer_types: Of the only phase; None: `default_types`.
        window: Of the only phase; None: MIXTURE_WINDOW where `layer_types` is None too, and has windows.
        sink_tokens: Of the only phase.
        phases: The long form, with none of the others.
        default_types: Of the model in question, by `default_layer_types`; MIXTURE where only the ends of phases matter.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range, or both forms are given.
    """
    if phases is None:
        until = SWITCH_AT if switch_at is None else check_switch_at(switch_at)
        if layer_types is None:
            layer_types = cast("Sequence[LayerType]", default_types)
            window = MIXTURE_WINDOW if window is None and WINDOW in layer_types else window
        return [Phase(until, list(layer_types), window, sink_tokens)]
    check_phases(phases)
    short = {"switch_at": switch_at, "layer_types": layer_types, "window": window, "sink_tokens": sink_tokens or None}
    for name, value in short.items():
        if value is not None:
            raise ValueError(f"phases and {name} cannot both be given: a phase has its own")
    return list(phases)


def is_default(phases: Sequence[Phase] | None, layer_types: Sequence[str] | None, *others: int | None) -> bool:
    """Whether a user says nothing of how the layers attend; `others`: window and sink_tokens."""
    return phases is None and layer_types is None and not any(others)


def name_phases(phases: Sequence[Phase]) -> list[str]:
    """A name for each phase that no other has, nor the dense one behind them: its words, numbered where it must be."""
    words = [phase.words for phase in phases]
    taken = [*words, DENSE]
    return [f"{name} (phase {number})" if taken.count(name) > 1 else name for number, name in enumerate(words, start=1)]


def check_phases(phases: Sequence[Phase]) -> None:
    """Refuse phases that end in no rising order, as far as that is known before the number of steps is.

    Raises:
        TypeError: They are no list of phases.
        ValueError: There are none, or one ends before the one ahead of it.
    """
    if not isinstance(phases, list | tuple) or not all(isinstance(phase, Phase) for phase in phases):
        raise TypeError(f"phases must be a list of Phase, got {quoted(phases)}")
    if not phases:
        raise ValueError("phases must name at least one phase, got []")
    for kind in (int, float):
        ends = [phase.until for phase in phases if type(phase.until) is kind]
        if any(after <= before for before, after in pairwise(ends)):
            raise ValueError(f"phases must end in rising order, got until {', '.join(str(p.until) for p in phases)}")
