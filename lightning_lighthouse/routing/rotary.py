"""How a model rotates q and k, for rotate="after": as its own modules do it, or as it is given.

A module of transformers that makes cosines and sines holds its frequencies in a buffer; that buffer is read at each
call, for some models change it with the length. What it says is believed only once the model's own functions have
rotated a vector and the same came out. Other modules say how they rotate by an attribute `rotary`, a mapping as the
argument is one.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lightning_lighthouse.attention.rotation import Pairing, Rotation
from lightning_lighthouse.checks import SettingError, quoted
from lightning_lighthouse.routing.scope import Rotary

# What the argument `rotary` may say; the names are those of transformers, but for the pairing
RotarySetting = dict[str, float | str]
PAIRINGS = get_args(Pairing)
# The function by which transformers' modules rotate q and k
APPLY = "apply_rotary_pos_emb"
# The vector of the trial is rotated by so many positions
TRIAL = 3
GIVE = "give the frequencies by rotary={'rope_theta': 10000.0, 'pairing': 'half'}, or set rotate='before'"


class GivenRotary(Rotary):
    """Frequencies by their base.

    Args:
        rope_theta: The base: pair i of R channels turns by `rope_theta ** (-2 i / R)` a token.
        pairing: As in `Rotation`.
        partial_rotary_factor: The share of the channels that are rotated.
    """

    def __init__(self, rope_theta: float, pairing: str = "half", partial_rotary_factor: float = 1.0) -> None:
        self._theta, self._pairing, self._share = float(rope_theta), pairing, float(partial_rotary_factor)
        self._last: tuple[tuple[int, torch.device], Rotation] | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GivenRotary) and self._said == other._said

    __hash__ = None  # type: ignore[assignment]

    @property
    def _said(self) -> tuple[float, str, float]:
        return self._theta, self._pairing, self._share

    def rotation(self, q: Tensor) -> Rotation:
        """As q, `[..., D]`, was rotated."""
        made_for = q.shape[-1], q.device
        if not torch.compiler.is_compiling() and self._last is not None and self._last[0] == made_for:
            return self._last[1]
        rotated = int(q.shape[-1] * self._share)
        exponents = torch.arange(0, rotated, 2, device=q.device, dtype=torch.float32) / rotated
        rotation = Rotation(self._theta**-exponents, self._pairing)  # type: ignore[arg-type]
        if not torch.compiler.is_compiling():
            self._last = made_for, rotation
        return rotation


class FoundRotary(Rotary):
    """Frequencies that a module keeps in a buffer.

    Args:
        module: It.
        name: Of the buffer.
        pairing: As in `Rotation`.
    """

    def __init__(self, module: nn.Module, name: str, pairing: str) -> None:
        self._module, self._name, self._pairing = module, name, pairing
        self._last: Rotation | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FoundRotary) or self._pairing != other._pairing:
            return False
        return self._inv_freq is other._inv_freq or torch.equal(self._inv_freq, other._inv_freq)

    __hash__ = None  # type: ignore[assignment]

    @property
    def _inv_freq(self) -> Tensor:
        return getattr(self._module, self._name)

    def rotation(self, q: Tensor) -> Rotation:
        """As q was rotated, by the frequencies that the buffer has now."""
        inv_freq = self._inv_freq
        if torch.compiler.is_compiling():
            return Rotation(inv_freq, self._pairing)  # type: ignore[arg-type]
        if self._last is None or self._last.inv_freq is not inv_freq:
            self._last = Rotation(inv_freq, self._pairing)  # type: ignore[arg-type]
        return self._last


def check_rotary(rotary: Mapping[str, Any] | None) -> None:
    """Raise TypeError or ValueError if `rotary` is not what the argument may be."""
    if rotary is None:
        return
    if not isinstance(rotary, Mapping):
        raise TypeError(f"rotary must be a mapping such as {{'rope_theta': 10000.0}}, or None, got {quoted(rotary)}")
    known = ("rope_theta", "pairing", "partial_rotary_factor")
    unknown = [name for name in rotary if name not in known]
    if unknown or "rope_theta" not in rotary:
        raise ValueError(
            f"rotary must have rope_theta, and may have pairing and {known[2]}, got {quoted(dict(rotary))}"
        )
    for name, most in (("rope_theta", float("inf")), ("partial_rotary_factor", 1.0)):
        value = rotary.get(name, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
            limit = "" if most > 1 else " and at most 1"
            raise ValueError(f"rotary: {name} must be a number above 0{limit}, got {quoted(value)}")
    if rotary.get("pairing", "half") not in PAIRINGS:
        raise ValueError(f"rotary: pairing must be one of {', '.join(PAIRINGS)}, got {quoted(rotary['pairing'])}")


def find_rotary(model: nn.Module, layers: Mapping[str, nn.Module], given: Mapping[str, Any] | None) -> Rotary | None:
    """How these attention layers of a model rotate q and k, all alike; None where there are none.

    Args:
        model: Of the layers.
        layers: By name.
        given: The argument `rotary`; None: it is found.

    Raises:
        SettingError: It cannot be found, or the layers differ.
    """
    if given is not None:
        return GivenRotary(**given)
    first: str | None = None
    one: Rotary | None = None
    for name, layer in layers.items():
        rotary = _of_layer(model, name, layer)
        if one is None:
            first, one = name, rotary
        elif rotary != one:
            raise SettingError(
                f"rotate='after' takes one set of rotary frequencies, and {quoted(name)} rotates by others than "
                f"{quoted(first)}: leave one kind of layers dense by dense_layers, or set rotate='before'"
            )
    return one


def _of_layer(model: nn.Module, name: str, layer: nn.Module) -> Rotary:
    for owner in _owners(model, name):
        said = getattr(owner, "rotary", None)
        if isinstance(said, Mapping):
            check_rotary(said)
            return GivenRotary(**said)
        buffers = [(holder, buffer) for holder in owner.children() for buffer in _buffers(holder, layer)]
        if len(buffers) > 1:
            raise SettingError(f"rotate='after' found several rotary frequencies for {quoted(name)}: {GIVE}")
        for holder, buffer in buffers:
            if _may_not_rotate(layer):
                raise SettingError(
                    f"rotate='after' cannot see whether and where {quoted(name)} rotates its channels; if all routed "
                    f"layers do, {GIVE}"
                )
            pairing = _pairing(holder, buffer, layer)
            if pairing is None:
                raise SettingError(
                    f"rotate='after' found rotary frequencies for {quoted(name)} but not how they are applied: {GIVE}"
                )
            return FoundRotary(holder, buffer, pairing)
    raise SettingError(
        f"rotate='after' found no rotary frequencies for {quoted(name)}, as where positions are learned: {GIVE}"
    )


def _owners(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """A layer and what it lies in, from the inside out."""
    parts = name.split(".") if name else []
    for end in range(len(parts), -1, -1):
        yield model.get_submodule(".".join(parts[:end]))


def _buffers(holder: nn.Module, layer: nn.Module) -> list[str]:
    """Names of the buffers with the frequencies of a layer: the only ones, or those of its type."""
    names = [name for name, _ in holder.named_buffers(recurse=False)]
    own = f"{_layer_type(layer)}_inv_freq"
    return [name for name in ("inv_freq", own) if name in names]


def _layer_type(layer: nn.Module) -> str | None:
    """The type that transformers gives a layer of a model that mixes them."""
    number, kinds = getattr(layer, "layer_idx", None), getattr(getattr(layer, "config", None), "layer_types", None)
    listed = kinds[number] if kinds and isinstance(number, int) else None
    return getattr(layer, "layer_type", None) or listed


def _may_not_rotate(layer: nn.Module) -> bool:
    """Whether a layer rotates other channels than the first, or by its own settings perhaps none."""
    if hasattr(layer, "qk_nope_head_dim"):
        return True
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(type(layer).forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    tests = [node.test for node in ast.walk(tree) if isinstance(node, ast.If) and _names(node) & {APPLY}]
    return any("self" in _names(test) for test in tests)


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _pairing(holder: nn.Module, buffer: str, layer: nn.Module) -> str | None:
    """The pairing by which the model's own functions rotate as the buffer says; None where neither fits."""
    apply = next((found for kind in type(layer).__mro__ if (found := _apply_of(kind))), None)
    if apply is None:
        return None
    try:
        with torch.no_grad():
            # a copy: some change their frequencies when they are asked
            maker = deepcopy(holder)
            inv_freq = getattr(maker, buffer)
            x = torch.linspace(0.5, 2.0, 2 * len(inv_freq), device=inv_freq.device).view(1, 1, 1, -1)
            needs_type = "layer_type" in inspect.signature(maker.forward).parameters
            positions = torch.full((1, 1), TRIAL, device=x.device)
            cos, sin = maker(x, positions, **({"layer_type": _layer_type(layer)} if needs_type else {}))
            rotated = apply(x, x, cos, sin)[0]
            # what some multiply cosines and sines by is no part of the rotation
            rotated = rotated * (x.norm() / rotated.norm())
            for pairing in PAIRINGS:
                rotation = Rotation(getattr(maker, buffer), pairing)
                if torch.allclose(rotation.turn(x, rotation.within(TRIAL + 1, x)[:, :1]), rotated, atol=1e-4):
                    return pairing
    # functions of another signature say nothing
    except Exception:
        return None
    return None


def _apply_of(kind: type) -> Callable[..., Any] | None:
    return getattr(sys.modules.get(kind.__module__), APPLY, None)
