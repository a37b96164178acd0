"""How far a model's rotary positions reach, and how they are made to reach further."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_lighthouse.checks import SettingError, quoted
from lightning_lighthouse.notices import notice_once

# The layers of a model with two kinds of positions that see the whole sequence; the others have windows of their own
GLOBAL = "full_attention"
# Their factor says how many times further they reach
SCALED = ("linear", "dynamic", "yarn", "llama3", "longrope")
# These choose frequencies by the last position that they see
BY_LENGTH = ("dynamic", "longrope")
# What belongs to a way of scaling; others, as "partial_rotary_factor", belong to the model
OF_SCALING = (
    "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim", "truncate", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor",
)  # fmt: skip


def extend_positions(
    config: Any, sequence_length: int | None, rope_theta: float | None, rope_parameters: Mapping[str, Any] | None
) -> None:
    """Let a model's config reach `sequence_length` tokens.

    Args:
        config: Of transformers; changed in place: `rope_parameters`, and `max_position_embeddings` where it grows.
        sequence_length: Tokens of a sequence; None: not known yet, and not checked.
        rope_theta: The new base of the frequencies. None: the model's.
        rope_parameters: transformers' own, laid over the model's: `{"rope_type": "yarn", "factor": 4.0}`. None: the
            model's. At most one of the two.

    Raises:
        SettingError: Both were given, the model has no rotary positions, they are wrong, or they do not reach so far.
    """
    if rope_theta is not None and rope_parameters is not None:
        raise SettingError("rope_theta and rope_parameters say the same: give one of them, and theta inside the latter")
    before = dict(_global(config)) if getattr(config, "rope_parameters", None) else {}
    given = {"rope_theta": rope_theta} if rope_theta is not None else dict(rope_parameters or {})
    if given:
        _lay_over(config, given)
    reach = reach_of(config)
    if reach is None or sequence_length is None or sequence_length <= reach:
        return
    after = _global(config) if before else {}
    # a factor that the last position asks for: theta changes nothing about how far it reaches
    is_dynamic = after.get("rope_type") == "dynamic"
    if not given:
        kind = "rope_parameters with a greater factor" if is_dynamic else "rope_theta or rope_parameters"
        raise SettingError(
            f"sequence_length must be at most the {reach:,} positions that the model was made for, got "
            f"{sequence_length:,}: give {kind if before else 'a model with them'}"
        )
    changed = {name for name, value in after.items() if value != before.get(name)}
    is_of_theta = "rope_theta" in given and changed <= {"rope_theta"}
    if is_dynamic or (after["rope_type"] in SCALED and not is_of_theta):
        _check_factor(config, before, given, sequence_length)
    else:
        _look_at_theta(config, before, sequence_length)
    config.max_position_embeddings = sequence_length


def _check_factor(config: Any, before: Mapping[str, Any], given: Mapping[str, Any], sequence_length: int) -> None:
    """Refuse a sequence beyond what the factor reaches, and keep what it multiplies for the next one."""
    parameters, reach = _global(config), int(config.max_position_embeddings)
    base = parameters.get("original_max_position_embeddings") or reach
    # Phi has none: transformers makes it of these
    factor = parameters.get("factor") or reach / base
    if parameters["rope_type"] == "dynamic":
        base = reach
    elif parameters["rope_type"] == before.get("rope_type") and before.get("factor"):
        # Llama 3.1 was trained further than its factor says: a greater one reaches further by as much as it is greater
        base = max(base, int(reach / before["factor"]))
    furthest = max(reach, int(base * factor))
    if sequence_length > furthest:
        raise SettingError(
            f"sequence_length must be at most {furthest:,} with rope_parameters {quoted(dict(given))}, of which the "
            f"factor, {factor:g}, multiplies {base:,} positions, got {sequence_length:,}: raise the factor"
        )
    parameters.setdefault("original_max_position_embeddings", base)


def least_theta(theta: float, reach: float, sequence_length: float, channels: int) -> float:
    """The base from which on no pair of channels turns further over a longer sequence than the model has seen.

    Pairs that had come full circle have seen all angles, and are left out.

    Args:
        theta: The base that the model was trained with.
        reach: Tokens that it was trained with.
        sequence_length: Tokens of the longer sequence.
        channels: Of a head, that are rotated: pair i turns by `theta ** (-2 i / channels)` a token.
    """
    seen = reach / math.tau
    if seen <= 1 or theta <= 1:
        # the fastest pair, which no base slows down, was one of them
        return theta
    # the fastest pair that had not come full circle is to slow down by most
    pair = max(1, math.ceil(channels / 2 * math.log(seen) / math.log(theta)))
    if 2 * pair >= channels:
        return theta
    return theta * math.exp(channels / (2 * pair) * math.log(sequence_length / reach))


def _look_at_theta(config: Any, before: Mapping[str, Any], sequence_length: int) -> None:
    """Warn of a base with which positions far back are angles that the model has never seen."""
    parameters, reach, theta = _global(config), int(config.max_position_embeddings), float(before["rope_theta"])
    if parameters["rope_type"] == "longrope":
        # of a longer reach transformers would make another scale of attention
        parameters.setdefault("factor", reach / parameters["original_max_position_embeddings"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    channels = int(getattr(config, "qk_rope_head_dim", head_dim) * parameters.get("partial_rotary_factor", 1.0))
    # what slows down the channels in question by itself, so that a position is as one so much nearer
    slower, slower_before = _slowing(parameters), _slowing(before)
    if before.get("rope_type") != "longrope":
        # some that yarn has taken further say the reach of before
        reach = max(reach, int((before.get("original_max_position_embeddings") or 0) * slower_before))
    least = least_theta(theta, reach / slower_before, sequence_length / slower, channels)
    if parameters["rope_theta"] < least:
        notice_once(
            "low theta",
            f"rope_theta {parameters['rope_theta']:,.0f} is low for {sequence_length:,} tokens of a model that was "
            f"made for {reach:,} with {theta:,.0f}: its last tokens come out worse for what is far back; from "
            f"{least:,.0f} on no channel turns further than it has seen",
        )


def _slowing(parameters: Mapping[str, Any]) -> float:
    """By what a way of scaling divides the frequencies of the slowest channels."""
    kind = parameters.get("rope_type", "default")
    if kind in ("linear", "yarn", "llama3"):
        return float(parameters.get("factor") or 1.0)
    return float(max(parameters["long_factor"])) if kind == "longrope" else 1.0


def reach_of(config: Any) -> int | None:
    """Tokens that a model's positions reach; None where its config does not say.

    Args:
        config: Of transformers, of the text.
    """
    reach: int | None = getattr(config, "max_position_embeddings", None)
    parameters = _global(config) if getattr(config, "rope_parameters", None) else {}
    if reach is not None and parameters.get("rope_type") == "dynamic":
        return int(reach * parameters.get("factor", 1.0))
    return reach


def check_shared(config: Any) -> None:
    """Refuse rotary positions that look at the last one, which differs between the ranks of a shared sequence.

    Raises:
        SettingError: They do.
    """
    kind = _global(config).get("rope_type") if getattr(config, "rope_parameters", None) else None
    if kind in BY_LENGTH:
        raise SettingError(
            f"rope_type {quoted(kind)} rotates by the last position of a rank, which the ranks that share a sequence "
            "do not agree on: use another of rope_parameters, such as yarn, or train without context parallelism"
        )


def _global(config: Any) -> dict[str, Any]:
    parameters: dict[str, Any] = config.rope_parameters
    return parameters.get(GLOBAL, parameters)


def _lay_over(config: Any, given: dict[str, Any]) -> None:
    if not getattr(config, "rope_parameters", None):
        raise SettingError(f"a {config.model_type} has no rotary positions: leave out rope_theta and rope_parameters")
    parameters = _global(config)
    theta = given.get("rope_theta", parameters.get("rope_theta"))
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
        raise SettingError(f"rope_theta must be a number greater than 0, got {quoted(theta)}")
    kind = given.get("rope_type", parameters.get("rope_type", "default"))
    if kind not in ("default", *SCALED):
        raise SettingError(f"rope_type must be one of default, {', '.join(SCALED)}, got {quoted(kind)}")
    if given.get("rope_type", kind) != parameters.get("rope_type", "default"):
        # what belonged to another type would be in the way
        for name in OF_SCALING:
            parameters.pop(name, None)
    parameters.update({**given, "rope_theta": float(theta), "rope_type": kind})
    if kind in ("yarn", "llama3") and "original_max_position_embeddings" not in parameters:
        parameters["original_max_position_embeddings"] = config.max_position_embeddings
    try:
        config.validate_rope()
    except (KeyError, ValueError, TypeError) as error:
        raise SettingError(f"rope_parameters: {' '.join(str(error).split())}") from None
