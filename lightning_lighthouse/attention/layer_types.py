"""How each attention layer attends: the types, the pattern over the layers, and its name in words.

`layer_types` is the word of transformers' configs, and is used as there: one type for each layer, in their order. A
shorter list is a pattern that is repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from lightning_lighthouse.checks import SettingError, check_count, check_type, quoted

LIGHTHOUSE = "lighthouse"
WINDOW = "window"
CHUNK = "chunk"
DENSE = "dense"
LAYER_TYPES = (LIGHTHOUSE, WINDOW, CHUNK, DENSE)
# Where a user asks for none: at equal time 0.4 nats better than Lighthouse in all layers (docs/numbers/study.md)
MIXTURE = (WINDOW, WINDOW, WINDOW, LIGHTHOUSE)
MIXTURE_WINDOW = 512


def check_layer_types(layer_types: Sequence[str], window: int | None, sink_tokens: int) -> tuple[str, ...]:
    """Return `layer_types` as a tuple if the three go together.

    Args:
        layer_types: One or more of LAYER_TYPES.
        window: Tokens that a layer of type "window" sees, itself included; tokens of a block of type "chunk".
        sink_tokens: First tokens that stay visible to every token of a "window" layer.

    Raises:
        TypeError: One has the wrong type.
        ValueError: A type does not exist, or a value is missing, out of range, or used by none of the types.
    """
    allowed = f"a list of {', '.join(map(repr, LAYER_TYPES))}"
    if isinstance(layer_types, str) or not isinstance(layer_types, Sequence):
        raise TypeError(f"layer_types must be {allowed}, got {quoted(layer_types)}")
    wrong = [kind for kind in layer_types if kind not in LAYER_TYPES]
    if wrong or not layer_types:
        raise ValueError(f"layer_types must be {allowed}, got {quoted(wrong[0] if wrong else list(layer_types))}")
    check_type("window", window, int | None)
    check_count("sink_tokens", sink_tokens)
    windowed = [kind for kind in (WINDOW, CHUNK) if kind in layer_types]
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if windowed and window is None:
        raise ValueError(f"window must be given with layer_types {quoted(windowed[0])}: how many tokens it sees")
    if window is not None and not windowed:
        raise ValueError(
            f"window is for layer_types 'window' and 'chunk', got {window} with {quoted(list(layer_types))}"
        )
    if sink_tokens and WINDOW not in layer_types:
        raise ValueError(f"sink_tokens is for layer_types 'window', got {sink_tokens} with {quoted(list(layer_types))}")
    return tuple(layer_types)


def spread_over(layer_types: Sequence[str], num_layers: int) -> tuple[str, ...]:
    """One type for each layer: the pattern repeated, the last time as far as it goes.

    Raises:
        SettingError: There are more types than layers.
    """
    if len(layer_types) > num_layers:
        raise SettingError(f"layer_types names {len(layer_types)} layers, the model has {num_layers} attention layers")
    return tuple(layer_types[layer % len(layer_types)] for layer in range(num_layers))


def counted_back(pattern: Sequence[str], num_layers: int) -> tuple[str, ...]:
    """One type for each layer: the pattern repeated so that it ends with the last one."""
    return tuple(pattern[(layer - num_layers) % len(pattern)] for layer in range(num_layers))


def in_words(layer_types: Sequence[str], window: int | None, sink_tokens: int = 0) -> str:
    """The shortest pattern behind the types, as in "window 512 \u00d73 + lighthouse"."""
    sinks = f" ({sink_tokens} sinks)" if sink_tokens else ""
    shown = {WINDOW: f"window {window}{sinks}", CHUNK: f"chunk {window}"}
    count = len(layer_types)
    # a pattern that comes but once may be one that goes on otherwise
    units = [n for n in range(1, count // 2 + 1) if all(layer_types[i] == layer_types[i % n] for i in range(count))]
    unit = min(units, default=count)
    runs = ((kind, len(list(run))) for kind, run in groupby(layer_types[:unit]))
    return " + ".join(shown.get(kind, kind) + (f" \u00d7{length}" if length > 1 else "") for kind, length in runs)
