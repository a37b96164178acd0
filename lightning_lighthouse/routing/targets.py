"""Find the attention modules of a model, and decide which of them stay dense.

A module is a target if one of its own methods reaches `scaled_dot_product_attention`: by name, as the bare builtin
under any name, through a function it calls, or through the attention table of transformers. Names are read from the
compiled code of the methods; nothing runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from functools import partial
from types import CodeType, FunctionType
from typing import Any, Literal
from weakref import WeakKeyDictionary

from torch import nn

from lightning_lighthouse.attention.layer_types import DENSE
from lightning_lighthouse.attention.sdpa import stock_sdpa
from lightning_lighthouse.checks import SettingError, quoted
from lightning_lighthouse.notices import notice_once
from lightning_lighthouse.routing.own_windows import without_windowed

# Names in a method that show that it calls SDPA; the second is the table that transformers looks the call up in.
SDPA = "scaled_dot_product_attention"
SDPA_NAMES = frozenset({SDPA, "ALL_ATTENTION_FUNCTIONS"})
# The package, whose `causal_attention` a method may call by attribute.
PACKAGE = "lightning_lighthouse"
# A method, a function that it calls, and one that this one calls.
CALL_DEPTH = 2
# Attention layers that stay dense: positions, negative from the end; those of the paper; None and [] for none.
DenseLayers = list[int] | Literal["published"] | None
# From this many attention layers on, two at each end stay dense as published; below, one.
DEEP_MODEL = 16


def find_targets(model: nn.Module, select: str | None = None) -> dict[str, nn.Module]:
    """The attention modules of `model` by name, in the order of `named_modules`.

    Args:
        model: Searched through, wrappers included.
        select: Glob over module names, for example "*.attn". It narrows the modules found; where none of those
            matches, it names the targets itself, for models whose call to SDPA cannot be seen from outside.

    Raises:
        ValueError: Nothing found; the message lists modules that look like attention. SettingError with `select`.
    """
    named = dict(model.named_modules())
    found = _innermost({name: module for name, module in named.items() if _is_attention(module)})
    if select is not None:
        matching = {name: module for name, module in found.items() if fnmatchcase(name, select)}
        found = matching or {name: module for name, module in named.items() if fnmatchcase(name, select)}
    if not found and select is not None:
        raise SettingError(
            f"select must match the name of a module of {type(model).__name__}, got {quoted(select)}; modules that "
            f"look like attention: {_lookalikes(named)}"
        )
    if not found:
        raise ValueError(
            f"no module calls SDPA in {type(model).__name__}: Lighthouse replaces calls of "
            "torch.nn.functional.scaled_dot_product_attention; modules that look like attention: "
            f"{_lookalikes(named)}; call it, or lightning_lighthouse.causal_attention, in their forward"
        )
    return found


def choose_routed(targets: dict[str, nn.Module], dense_layers: DenseLayers) -> dict[str, nn.Module]:
    """The targets that are routed: all but the dense layers, and those that have windows of their own beside others.

    Args:
        targets: Attention modules by name, in order.
        dense_layers: Positions among the targets that stay dense, negative from the end; None and [] for none.
            "published": the first and last two of 16 or more, else the first and last (paper, section 4.1).

    Raises:
        TypeError: `dense_layers` is none of these.
        SettingError: A position is out of range, or no layer is left to route.
    """
    names = list(targets)
    count = len(names)
    check_layers(dense_layers)
    if dense_layers == "published":
        ends = 2 if count >= DEEP_MODEL else 1
        dense = {*range(ends), *range(count - ends, count)}
    else:
        positions = dense_layers or []
        for layer in positions:
            if not -count <= layer < count:
                raise SettingError(f"dense_layers must be from {-count} to {count - 1} for {count} layers, got {layer}")
        dense = {layer % count for layer in positions}
    routed = without_windowed({name: targets[name] for position, name in enumerate(names) if position not in dense})
    if not routed:
        raise SettingError(
            f"all {count} attention layers stay dense (dense_layers={quoted(dense_layers)}), nothing is left to route; "
            "leave dense_layers out to route every layer"
        )
    return routed


def check_layers(dense_layers: DenseLayers) -> None:
    """Raise TypeError if `dense_layers` is none of `DenseLayers`."""
    if dense_layers is None or dense_layers == "published":
        return
    if not isinstance(dense_layers, list | tuple) or any(type(layer) is not int for layer in dense_layers):
        raise TypeError(f"dense_layers must be a list of integers, 'published' or None, got {quoted(dense_layers)}")


def _is_attention(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    methods = [method for kind in type(module).__mro__ if _is_foreign(kind) for method in vars(kind).values()]
    # and functions that the instance keeps
    kept = list(vars(module).values())
    if any(value is stock_sdpa or (isinstance(value, partial) and value.func is stock_sdpa) for value in kept):
        return True
    methods.append(vars(module).get("forward"))
    methods += [value for value in kept if isinstance(value, FunctionType) and not _is_torch(value)]
    return any(_reaches_sdpa(method, CALL_DEPTH) for method in map(_plain_function, methods) if method)


def _is_foreign(kind: type) -> bool:
    """Whether a class is the user's: torch's own layers reach SDPA only through nn.MultiheadAttention.

    The base class of transformers' models only manages attention functions, it calls none.
    """
    frameworks = ("torch.nn.", "lightning.pytorch.", "transformers.modeling_utils")
    return kind is not object and not kind.__module__.startswith(frameworks)


def _plain_function(method: Any) -> FunctionType | None:
    method = getattr(method, "__func__", method)
    method = getattr(method, "__wrapped__", method)
    return method if isinstance(method, FunctionType) else None


# by function and depth; a forward that an instance keeps holds its module, which is not to live on here
_reaching: WeakKeyDictionary[FunctionType, dict[int, bool]] = WeakKeyDictionary()


def _reaches_sdpa(function: FunctionType, depth: int) -> bool:
    known = _reaching.setdefault(function, {})
    if depth not in known:
        known[depth] = _looks_like_sdpa(function, depth)
    return known[depth]


def _looks_like_sdpa(function: FunctionType, depth: int) -> bool:
    names = set(_names(function.__code__))
    if names & SDPA_NAMES:
        return True
    used = [function.__globals__[name] for name in names if name in function.__globals__]
    used += [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    if any(value is stock_sdpa for value in used):
        return True
    if "causal_attention" in names and any(getattr(value, "__name__", "") == PACKAGE for value in used):
        return True
    if depth == 0:
        return False
    called = (_plain_function(value) for value in used)
    return any(_reaches_sdpa(value, depth - 1) for value in called if value and not _is_torch(value))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _is_torch(function: FunctionType) -> bool:
    return (function.__module__ or "").split(".")[0] in ("torch", "lightning")


def _innermost(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Drop modules that contain another: a model whose helper mentions SDPA is not an attention layer.

    One whose own forward calls SDPA is, whatever it contains.
    """
    ancestors = {name[:end] for name in modules for end in range(len(name)) if name[end] == "."}
    if any(modules):
        ancestors.add("")
    return {name: module for name, module in modules.items() if name not in ancestors or _calls_sdpa(module)}


def _calls_sdpa(module: nn.Module) -> bool:
    forward = _plain_function(type(module).forward)
    return forward is not None and SDPA in _names(forward.__code__)


def _lookalikes(named: dict[str, nn.Module]) -> str:
    classes: dict[str, str] = {}
    for name, module in named.items():
        # not its projections and norms
        is_whole = any(True for _ in module.children()) and "attn" in name.rpartition(".")[2].lower()
        if is_whole or "attention" in type(module).__name__.lower():
            classes.setdefault(type(module).__name__, name)
    if not classes:
        return "none"
    return ", ".join(f"{name} ({kind})" for kind, name in list(classes.items())[:8])


def tell_lost(layer_types: Collection[str], routed: Collection[str]) -> None:
    """Warn, once, of types that were asked for and that no layer is left to attend by.

    Args:
        layer_types: Asked for, a type for each attention layer.
        routed: The types of those that are routed.
    """
    for kind in sorted({*layer_types} - {*routed, DENSE}):
        notice_once(
            f"no layer of type {kind} in {(*layer_types,)}",
            f"no layer attends by {quoted(kind)}: those that layer_types gives it stay dense, by dense_layers, select "
            "or windows of their own",
        )
