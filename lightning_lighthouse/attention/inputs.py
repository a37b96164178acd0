"""What every attention here takes: q, k and v that fit together, cast as autocast casts those of the builtin."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def plain(*sizes: int) -> list[int]:
    """Sizes as plain ints, also where Dynamo traces them as symbols."""
    # it knows that a range has a plain length; int() of a symbol is one again
    return [len(range(size)) for size in sizes]


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast casts the inputs of the builtin; it does not know this function."""
    device = tensors[0].device.type
    # torch refuses to be asked about meta
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    # the builtin keeps float64 too
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError, with the sizes, if shapes, dtypes or devices do not fit together."""
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k and v must be [batch, heads, tokens, head dim], got {_sizes(q, k, v)}")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"k and v must have one shape, and batch, tokens and head dim of q, got {_sizes(q, k, v)}")
    if min(*q.shape[1:], *k.shape[1:]) < 1:
        raise ValueError(f"q, k and v must have at least one head, token and channel, got {_sizes(q, k, v)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"the query heads must be a multiple of the key/value heads, got {_sizes(q, k, v)}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise ValueError(
            f"q, k and v must have one floating dtype of 16, 32 or 64 bits, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
