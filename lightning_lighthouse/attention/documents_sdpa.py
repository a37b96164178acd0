"""Dense causal attention that stays inside documents: one operator for all of a batch, with an explicit backward.

The rows of all sequences lie one behind the other, and each document is attended to by itself; nothing is masked, so
cost and memory are those of its own length. Long documents get stock SDPA each, runs of short ones between them a
varlen kernel at once (`documents_backends.py`).
"""

# B sequences, H query heads, G key/value heads, N tokens, T rows of all sequences, D head dim, n rows of one document

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_lighthouse.attention.document_tables import Packing, place_tables
from lightning_lighthouse.attention.documents import Documents, check_covers
from lightning_lighthouse.attention.documents_backends import KERNELS, RUNS, Part, efficient_rows
from lightning_lighthouse.attention.host_tables import boundaries, once_a_batch, to_device
from lightning_lighthouse.attention.inputs import autocast
from lightning_lighthouse.attention.operators import Operator, empty_heads_inner
from lightning_lighthouse.attention.sdpa import backend_of

# Longer documents fill a GPU by themselves, and cuDNN is faster there than the varlen kernel.
LONG = 8192
# What the varlen kernel of flash takes
MAX_VARLEN_DIM = 256
WITH_EQUAL_HEADS = ("efficient", "math")
VARLEN_CAPABILITY = (8, 0)


def documents_sdpa(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Causal SDPA of every document by itself, with grouped heads.

    Args:
        q: `[B, Hq, N, D]`.
        k: `[B, Hkv, N, D]`.
        v: `[B, Hkv, N, D]`.
        documents: Of B sequences of N tokens.
        scale: Factor of the attention logits; None: `D ** -0.5`.
        backend: As in `causal_sdpa`. "auto" and "flash" run short documents on flash's varlen kernel where it can.

    Returns:
        `[B, Hq, N, D]`, in the dtype of q, or that of autocast.

    Raises:
        TypeError: `documents` are none.
        ValueError: The documents are of another batch, or the named backend cannot run this call.
    """
    check_covers(documents, q)
    q, k, v = autocast(q, k, v)
    return attend_rows(q, k, v, documents.host, scale, backend)


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    host: Tensor,
    scale: float | None,
    backend: str,
    packing: Packing | None = None,
) -> Tensor:
    """As `documents_sdpa`, for boundaries `host` as in `Documents`; rows behind the last one get zeros.

    With `packing` the rows are those that are gathered from the documents.
    """
    factor = q.shape[3] ** -0.5 if scale is None else scale
    numbers, rule = packing or ([], "")
    return _attend_fwd(q, k, v, host, factor, backend, numbers, rule)[0]


def _attend_documents(
    q: Tensor, k: Tensor, v: Tensor, host: Tensor, scale: float, backend: str, numbers: list[int], rule: str
) -> tuple[Tensor, Tensor]:
    out, lse = _empty_output(q, k, v, host, scale, backend, numbers, rule)
    flat_out = _flat(out)
    plan = _plan(q, k, host, backend, numbers, rule)
    rows = _flat(q), _heads(k, q, plan), _heads(v, q, plan)
    for part in plan.parts:
        o_nHD, lse_Hn = part.forward(*(x[part.first : part.end] for x in rows), part, scale)
        flat_out[part.first : part.end] = o_nHD
        lse[:, part.first : part.end] = lse_Hn
    flat_out[plan.end :] = 0
    return out, lse


def _empty_output(
    q: Tensor, k: Tensor, v: Tensor, host: Tensor, scale: float, backend: str, numbers: list[int], rule: str
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return empty_heads_inner(q, q.shape[2]), q.new_empty((q.shape[1], q.shape[0] * q.shape[2]), dtype=dtype)


def _attend_documents_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    host: Tensor,
    scale: float,
    backend: str,
    numbers: list[int],
    rule: str,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _empty_gradients(dout, q, k, v, out, lse, host, scale, backend, numbers, rule)
    plan = _plan(q, k, host, backend, numbers, rule)
    # in the order of the output: the plan that torch keeps of cuDNN's backward holds that of the gradient too
    rows = _flat(dout).contiguous(), _flat(q), _heads(k, q, plan), _heads(v, q, plan), _flat(out)
    for part in plan.parts:
        here = slice(part.first, part.end)
        for whole, piece in zip(
            gradients, part.backward(*(x[here] for x in rows), lse[:, here], part, scale), strict=True
        ):
            # of repeated heads the sum
            heads = whole.shape[1]
            _flat(whole)[here] = piece if piece.shape[1] == heads else piece.unflatten(1, (heads, -1)).sum(2)
    for whole in gradients:
        _flat(whole)[plan.end :] = 0
    return gradients


def _empty_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    host: Tensor,
    scale: float,
    backend: str,
    numbers: list[int],
    rule: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (empty_heads_inner(x, x.shape[2]) for x in (q, k, v))
    return dq, dk, dv


def _flat(x_BHND: Tensor) -> Tensor:
    """`[T, H, D]`, channels contiguous: a view, or a copy where the memory is ordered otherwise."""
    x_THD = x_BHND.transpose(1, 2).flatten(0, 1)
    return x_THD if x_THD.stride(-1) == 1 else x_THD.contiguous()


def _heads(x_BGND: Tensor, q_BHND: Tensor, plan: _Plan) -> Tensor:
    """`[T, G, D]`, or `[T, H, D]` where the plan asks for it."""
    return _flat(x_BGND).repeat_interleave(q_BHND.shape[1] // x_BGND.shape[1], 1) if plan.repeats else _flat(x_BGND)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, host, *ctx.settings = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, host)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 8
    return *_attend_bwd(dout, *ctx.saved_tensors, *ctx.settings), *(None,) * 5


_attend_bwd = Operator(_attend_documents_backward, _empty_gradients)
_attend_fwd = Operator(_attend_documents, _empty_output, _setup_context, _backward)


class _Plan(NamedTuple):
    """How the rows of a batch are attended to.

    Args:
        parts: Documents and runs of them.
        end: The row behind the last one.
        repeats: Whether k and v must be repeated for the query heads.
    """

    parts: list[Part]
    end: int
    repeats: bool


def _plan(q: Tensor, k: Tensor, host: Tensor, backend: str, numbers: list[int], rule: str) -> _Plan:
    if numbers:
        host = place_tables(host, Packing(numbers, rule), q.device).host
    kernel, repeats = ("cpu", False) if q.device.type == "cpu" else backend_of(q, k, backend)
    repeats = q.shape[1] != k.shape[1] and (repeats or kernel in WITH_EQUAL_HEADS)
    takes_runs = kernel == "efficient" or (kernel in RUNS and backend in ("auto", "flash") and _takes_varlen(q))
    # deterministic algorithms have flash for all lengths
    long = None if kernel == "flash" else LONG
    key = ("sdpa", kernel, repeats, takes_runs, long)
    return once_a_batch(host, key, q.device, lambda: _make_plan(host, q.device, kernel, repeats, takes_runs, long))


def _takes_varlen(q: Tensor) -> bool:
    is_new = torch.cuda.get_device_capability(q.device) >= VARLEN_CAPABILITY
    dim = q.shape[3]
    return is_new and q.dtype in (torch.bfloat16, torch.float16) and dim % 8 == 0 and dim <= MAX_VARLEN_DIM


def _make_plan(
    host: Tensor, device: torch.device, kernel: str, repeats: bool, takes_runs: bool, long: int | None
) -> _Plan:
    ends = boundaries(host)
    forward, backward = KERNELS[kernel]
    parts: list[Part] = []
    run: list[int] = []

    def close() -> None:
        if len(run) > 1:
            parts.append(_run(run, device, kernel))
        run.clear()

    for first, end in pairwise(ends):
        if takes_runs and (long is None or end - first <= long):
            run.extend([end] if run else [first, end])
        else:
            close()
            parts.append(Part(first, end, forward, backward))
    close()
    return _Plan(parts, ends[-1], repeats)


def _run(ends: list[int], device: torch.device, kernel: str) -> Part:
    """Documents that lie one behind the other, in one call."""
    cu = np.array(ends) - ends[0]
    lengths = np.diff(cu)
    longest = int(lengths.max())
    places = None
    if kernel == "efficient":
        # the first place of its document, and the row's in it
        before = np.arange(len(lengths)) * efficient_rows(longest) - cu[:-1]
        places = to_device(np.arange(cu[-1]) + np.repeat(before, lengths), device).long()
    return Part(ends[0], ends[-1], *RUNS[kernel], to_device(cu, device), longest, places)
