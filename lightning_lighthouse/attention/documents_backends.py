"""The kernels behind `documents_sdpa`, each with its own backward, for operators run below autograd.

All take and return `[n, H, D]`: the rows of one document, or of a run of them. "efficient" and "math" want as many
heads of k and v as of q.
"""

# H query heads, G key/value heads, D head dim, n rows

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

# Rows of the logsumexp that the efficient kernel reads at a time
EFFICIENT_ROWS = 32
# Its name for a causal mask; as many rows of q as of k have but one
FROM_TOP_LEFT = 1


class Part(NamedTuple):
    """Rows that one kernel attends to at once: a document, or a run of them.

    Args:
        first: Row.
        end: The row behind the last one.
        forward: Of `[n, H, D]` q, k and v: o `[n, H, D]` and the logsumexp `[H, n]`.
        backward: Of the gradient, q, k, v, o and the logsumexp: the gradients of q, k and v.
        cu: `[documents + 1]` int32 on the device: where the documents of a run begin.
        longest: Rows of the longest of them.
        places: `[n]` int64 on the device: where the efficient kernel keeps the logsumexp of each row.
    """

    first: int
    end: int
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, ...]]
    cu: Tensor | None = None
    longest: int = 0
    places: Tensor | None = None


def _as_batch(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """`[n, H, D] -> [1, H, n, D]`."""
    return tuple(x.transpose(0, 1).unsqueeze(0) for x in tensors)


def _as_rows(x_1HnD: Tensor, rows: int) -> Tensor:
    return x_1HnD[0, :, :rows].transpose(0, 1)


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    o, lse = aten._scaled_dot_product_flash_attention_for_cpu(*_as_batch((q, k, v)), 0.0, True, scale=scale)
    return _as_rows(o, len(q)), lse[0]


def _cpu_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, part: Part, scale: float
) -> tuple[Tensor, ...]:
    # the order in which this kernel writes its logsumexp is the one in which it reads it
    lse_1Hn = lse.T.contiguous().T.unsqueeze(0)
    gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *_as_batch((do, q, k, v, o)), lse_1Hn, 0.0, True, scale=scale
    )
    return tuple(_as_rows(x, len(q)) for x in gradients)


def varlen_forward(q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    """Flash for a run of documents."""
    longest = part.longest
    o, lse, *_ = aten._flash_attention_forward(
        q, k, v, part.cu, part.cu, longest, longest, 0.0, True, False, scale=scale
    )
    return o, lse


def varlen_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, part: Part, scale: float
) -> tuple[Tensor, ...]:
    longest = part.longest
    state, unused = _no_dropout(q)
    return tuple(
        aten._flash_attention_backward(
            do, q, k, v, o, lse.contiguous(), part.cu, part.cu, longest, longest, 0.0, True, state, unused, scale=scale
        )
    )


def _no_dropout(q: Tensor) -> tuple[Tensor, Tensor]:
    """The states of a generator that is not used."""
    return q.new_zeros((2,), dtype=torch.uint64), q.new_empty((0,))


def _in_eights(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """`[1, n, H, D]` with zeros up to a multiple of 8 channels, which flash asks for."""
    return tuple((x if x.shape[-1] % 8 == 0 else F.pad(x, (0, -x.shape[-1] % 8))).unsqueeze(0) for x in tensors)


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    o, lse, *_ = aten._flash_attention_forward(
        *_in_eights((q, k, v)), None, None, len(q), len(q), 0.0, True, False, scale=scale
    )
    return o[0, ..., : q.shape[-1]], lse[0]


def _flash_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, part: Part, scale: float
) -> tuple[Tensor, ...]:
    state, unused = _no_dropout(q)
    gradients = aten._flash_attention_backward(
        *_in_eights((do, q, k, v, o)), lse.contiguous().unsqueeze(0), None, None, len(q), len(q),
        0.0, True, state, unused, scale=scale,
    )  # fmt: skip
    return tuple(x[0, ..., : q.shape[-1]] for x in gradients)


def _rounded(rows: int) -> int:
    """Rows up to a multiple of an eighth of the power of two below: few sizes, for cuDNN plans each one anew.

    At least two: its backward takes no single one.
    """
    step = max(1, 2 ** (rows.bit_length() - 1) // 8)
    return max(2, -(-rows // step) * step)


def _padded(tensors: Iterable[Tensor], rows: int) -> tuple[Tensor, ...]:
    """Zeros behind the last row: no row before sees them, and they have no gradient."""
    return _as_batch(x if len(x) == rows else F.pad(x, (0, 0, 0, 0, 0, rows - len(x))) for x in tensors)


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    o, lse, *_ = aten._scaled_dot_product_cudnn_attention(
        *_padded((q, k, v), _rounded(len(q))), None, True, 0.0, True, False, scale=scale
    )
    return _as_rows(o, len(q)), lse.flatten(2)[0, :, : len(q)]


def _cudnn_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, part: Part, scale: float
) -> tuple[Tensor, ...]:
    rows = _rounded(len(q))
    state = q.new_zeros((), dtype=torch.int64)
    lse_1Hn1 = F.pad(lse, (0, rows - len(q)))[None, :, :, None].contiguous()
    gradients = aten._scaled_dot_product_cudnn_attention_backward(
        *_padded((do, q, k, v, o), rows), lse_1Hn1, state, state, None, None, None, rows, rows, 0.0, True, scale=scale
    )
    return tuple(_as_rows(x, len(q)) for x in gradients)


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    o, lse, *_ = aten._scaled_dot_product_efficient_attention(*_as_batch((q, k, v)), None, True, 0.0, True, scale=scale)
    return _as_rows(o, len(q)), lse[0, :, : len(q)]


def _efficient_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, part: Part, scale: float
) -> tuple[Tensor, ...]:
    state = q.new_zeros((), dtype=torch.int64)
    inputs = _as_batch((do, q, k, v))
    # infinite where there is no row, as the forward has it
    lse_1Hn = F.pad(lse, (0, efficient_rows(len(q)) - len(q)), value=torch.inf).unsqueeze(0)
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        *inputs, None, *_as_batch((o,)), lse_1Hn, state, state, 0.0, [True, True, True, False], True, scale=scale
    )
    return tuple(_as_rows(x, len(q)) for x in (dq, dk, dv))


def efficient_run_forward(q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    """As `varlen_forward`, in fp32 too."""
    longest = part.longest
    o, lse, *_ = aten._efficient_attention_forward(
        *(x.unsqueeze(0) for x in (q, k, v)), None, part.cu, part.cu, longest, longest, 0.0, FROM_TOP_LEFT, True,
        scale=scale,
    )  # fmt: skip
    # a row for each document and head, as long as the longest document
    return o[0], lse.transpose(0, 1).flatten(1).index_select(1, part.places)


def efficient_run_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, part: Part, scale: float
) -> tuple[Tensor, ...]:
    """As `varlen_backward`, in fp32 too."""
    assert part.cu is not None
    assert part.places is not None
    longest, documents = part.longest, len(part.cu) - 1
    places = lse.new_full((len(lse), documents * efficient_rows(longest)), torch.inf)
    lse_DHn = places.index_copy_(1, part.places, lse).unflatten(1, (documents, -1)).transpose(0, 1).contiguous()
    state = q.new_zeros((), dtype=torch.int64)
    *gradients, _ = aten._efficient_attention_backward(
        *(x.unsqueeze(0) for x in (do, q, k, v)), None, o.unsqueeze(0), part.cu, part.cu, longest, longest, lse_DHn,
        0.0, state, state, FROM_TOP_LEFT, False, scale=scale,
    )  # fmt: skip
    return tuple(x[0] for x in gradients)


def efficient_rows(rows: int) -> int:
    """Rows of a logsumexp that the efficient kernel keeps for so many."""
    return -(-rows // EFFICIENT_ROWS) * EFFICIENT_ROWS


def _math_logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    logits_Hnn = torch.einsum("qhd,khd->hqk", q, k) * scale
    later = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).triu(1)
    return logits_Hnn.masked_fill(later, -torch.inf)


def _math_forward(q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = _math_logits(q.to(dtype), k.to(dtype), scale)
    lse = logits.logsumexp(-1)
    p = (logits - lse.unsqueeze(-1)).exp()
    return torch.einsum("hqk,khd->qhd", p, v.to(dtype)), lse


def _math_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, part: Part, scale: float
) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    do, q, k, v, o = (x.to(dtype) for x in (do, q, k, v, o))
    p = (_math_logits(q, k, scale) - lse.unsqueeze(-1)).exp()
    dp = torch.einsum("qhd,khd->hqk", do, v)
    ds = p * (dp - (do * o).sum(-1).T.unsqueeze(-1)) * scale
    dq = torch.einsum("hqk,khd->qhd", ds, k)
    return dq, torch.einsum("hqk,qhd->khd", ds, q), torch.einsum("hqk,qhd->khd", p, do)


KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "cpu": (_cpu_forward, _cpu_backward),
    "cudnn": (_cudnn_forward, _cudnn_backward),
    "flash": (_flash_forward, _flash_backward),
    "efficient": (_efficient_forward, _efficient_backward),
    "math": (_math_forward, _math_backward),
}

# Many documents at once, by the backend of the call
RUNS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "cudnn": (varlen_forward, varlen_backward),
    "flash": (varlen_forward, varlen_backward),
    "efficient": (efficient_run_forward, efficient_run_backward),
}
