"""Collectives with gradients as operators: in eager code and inside one compiled graph.

torch's functional collectives return tensors of a class of their own in eager code, and a `wait()` on a view of one has
no gradient (torch 2.14). These wait by themselves and return plain tensors. A group goes by its name, which is a
constant to Dynamo where the group need not be one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_lighthouse.attention.operators import Operator

# torch's new name since 2.14, and that of before
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_groups: dict[str, dist.ProcessGroup] = {}


def register(group: dist.ProcessGroup) -> str:
    """The name by which the operators find `group`."""
    name: str = group.group_name
    _groups[name] = group
    return name


def _all_to_all(x: Tensor, group: str) -> Tensor:
    sent = x.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=_groups[group])
    return received


def _keep_group(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.group = inputs[1]


_all_to_all_operator: Operator = Operator(
    _all_to_all,
    lambda x, group: x.new_empty(x.shape),
    _keep_group,
    lambda ctx, gradient: (_all_to_all_operator(gradient, ctx.group), None),
)


def all_to_all(x: Tensor, group: str) -> Tensor:
    """Block i of dimension 0 goes to rank i, and block i of the result came from rank i; as many blocks as ranks."""
    out: Tensor = _all_to_all_operator(x, group)
    return out


def _all_gather(x: Tensor, size: int, group: str) -> Tensor:
    sent = x.contiguous()
    received = sent.new_empty((size, *sent.shape))
    _gather(received.view(-1), sent.view(-1), group=_groups[group])
    return received


_all_gather_operator = Operator(_all_gather, lambda x, size, group: x.new_empty((size, *x.shape)))


def all_gather(x: Tensor, size: int, group: str) -> Tensor:
    """What each of `size` ranks holds: `[...] -> [size, ...]`, without a gradient."""
    out: Tensor = _all_gather_operator(x, size, group)
    return out


def _pass_on(x: Tensor, splits: list[int], group: str) -> Tensor:
    # what goes to each rank, and then what comes from each, in rows of dimension 0
    out_splits, in_splits = splits[: len(splits) // 2], splits[len(splits) // 2 :]
    sent = x.contiguous()
    received = sent.new_empty((sum(in_splits), *sent.shape[1:]))
    dist.all_to_all_single(received, sent, in_splits, out_splits, group=_groups[group])
    return received


def _keep_splits(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.splits, ctx.group = inputs[1:]


def _pass_back(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    half = len(ctx.splits) // 2
    return _pass_on_operator(gradient, ctx.splits[half:] + ctx.splits[:half], ctx.group), None, None


_pass_on_operator = Operator(
    _pass_on,
    lambda x, splits, group: x.new_empty((sum(splits[len(splits) // 2 :]), *x.shape[1:])),
    _keep_splits,
    _pass_back,
)


def pass_on(x: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
    """Rows of dimension 0 to other ranks: `sent[i]` of them go to rank i, in order, and `received[i]` come from it."""
    out: Tensor = _pass_on_operator(x, [*sent, *received], group)
    return out


def _pass_both(x: Tensor, y: Tensor, splits: list[int], group: str) -> tuple[Tensor, Tensor]:
    return _pass_on(x, splits, group), _all_to_all(y, group)


def _keep_both_splits(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.splits, ctx.group = inputs[2:]


def _pass_both_back(ctx: Any, gradient_x: Tensor, gradient_y: Tensor) -> tuple[Tensor, Tensor, None, None]:
    half = len(ctx.splits) // 2
    splits = ctx.splits[half:] + ctx.splits[:half]
    return *_pass_both_operator(gradient_x, gradient_y, splits, ctx.group), None, None


_pass_both_operator = Operator(
    _pass_both,
    lambda x, y, splits, group: (x.new_empty((sum(splits[len(splits) // 2 :]), *x.shape[1:])), y.new_empty(y.shape)),
    _keep_both_splits,
    _pass_both_back,
)


def pass_both(x: Tensor, y: Tensor, sent: list[int], received: list[int], group: str) -> tuple[Tensor, Tensor]:
    """`pass_on` of x and `all_to_all` of y, in this order on every rank, whatever order a compiler finds better."""
    out: tuple[Tensor, Tensor] = _pass_both_operator(x, y, [*sent, *received], group)
    return out
