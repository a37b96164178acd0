"""The stages for documents, all of a batch in one launch: the kernels with tables of where windows and tiles lie.

The sequences lie one behind the other, B N tokens of one sequence. Memory is kept for the most documents that a batch
may have, so that all batches have the same shapes; the numbers of this one are read on the host, inside the operators.
"""

# The legend is that of kernels/rows.py

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_lighthouse.attention.document_tables import Packing, PlacedTables, place_tables
from lightning_lighthouse.attention.kernels.ops import Operator, empty_heads_inner
from lightning_lighthouse.attention.kernels.rows import collect, num_slots, spread
from lightning_lighthouse.attention.kernels.score import launch_score
from lightning_lighthouse.attention.kernels.select import launch_select
from lightning_lighthouse.attention.kernels.select_causal import launch_select_causal
from lightning_lighthouse.attention.pyramid import PyramidShape


def _windows(shape: PyramidShape, num_windows: int) -> PyramidShape:
    """So many windows one behind the other, as the kernels of rows and scores count them."""
    return replace(
        shape, num_tokens=num_windows * shape.window(shape.num_levels - 1), num_tiles=num_windows, tile_entries=1
    )


def _tables(host: Tensor, numbers: list[int], rule: str, x: Tensor) -> tuple[PlacedTables, PyramidShape]:
    """The tables of the batch, and the shape of its windows."""
    packing = Packing(numbers, rule)
    tables = place_tables(host, packing, x.device)
    return tables, _windows(packing.shape, tables.windows.shape[1])


def _select_documents(
    q: Tensor,
    k: Tensor,
    host: Tensor,
    numbers: list[int],
    rule: str,
    cover_prefix: bool,
    seed: int,
    step: Tensor | None,
    first_head: int,
) -> Tensor:
    tables, windows = _tables(host, numbers, rule, q)
    shape = Packing(numbers, rule).shape
    num_windows, num_tiles = tables.windows.shape[1], tables.tiles.shape[1]
    slots = _empty_slots(q, k, host, numbers, rule, cover_prefix, seed, step, first_head).fill_(-1)
    reads_scores = rule in ("published", "causal")
    num_scores = windows.num_entries - windows.entries(0) if reads_scores else 0
    scores = torch.empty(2, 1, k.shape[1], num_scores, dtype=torch.float32, device=k.device)
    if reads_scores:
        launch_score(q, k, scores, windows, rule == "causal", tables.windows)
    # without an index, which nothing reads
    if rule == "causal":
        launch_select_causal(scores, slots, slots, shape, num_windows, num_tiles, tables.tiles)
    else:
        launch_select(
            scores, slots, slots, shape, num_windows, num_tiles, rule, cover_prefix, seed, step, first_head,
            tables.tiles,
        )  # fmt: skip
    return slots


def _empty_slots(
    q: Tensor,
    k: Tensor,
    host: Tensor,
    numbers: list[int],
    rule: str,
    cover_prefix: bool,
    seed: int,
    step: Tensor | None,
    first_head: int,
) -> Tensor:
    packing = Packing(numbers, rule)
    slots = num_slots(_windows(packing.shape, packing.capacity.windows))
    return torch.empty(1, k.shape[1], slots, dtype=torch.int32, device=k.device)


select_documents_fwd = Operator(_select_documents, _empty_slots)


def _gather_documents(
    x: Tensor, slots: Tensor, host: Tensor, numbers: list[int], rule: str, turns: Tensor | None, distance: int
) -> Tensor:
    tables, windows = _tables(host, numbers, rule, x)
    # rows that no tile fills are keys behind all others of their document, where NaN would not be masked
    xs = _empty_gathered(x, slots, host, numbers, rule, turns, distance).zero_()
    collect(x, xs, slots, windows, 0, False, tables.windows, turns, distance)
    return xs


def _empty_gathered(
    x: Tensor, slots: Tensor, host: Tensor, numbers: list[int], rule: str, turns: Tensor | None, distance: int
) -> Tensor:
    return empty_heads_inner(x, Packing(numbers, rule).capacity.rows)


def _gather_documents_backward(
    dxs: Tensor,
    slots: Tensor,
    host: Tensor,
    numbers: list[int],
    rule: str,
    heads_inner: bool,
    turns: Tensor | None,
    distance: int,
) -> Tensor:
    tables, windows = _tables(host, numbers, rule, dxs)
    dx = _empty_tokens(dxs, slots, host, numbers, rule, heads_inner, turns, distance)
    spread(dxs, dx, slots, windows, 0, False, tables.windows, turns, distance)
    return dx


def _empty_tokens(
    dxs: Tensor,
    slots: Tensor,
    host: Tensor,
    numbers: list[int],
    rule: str,
    heads_inner: bool,
    turns: Tensor | None,
    distance: int,
) -> Tensor:
    # in the memory order of x
    num_tokens = numbers[0] * Packing(numbers, rule).shape.num_tokens
    if heads_inner:
        return empty_heads_inner(dxs, num_tokens)
    return dxs.new_empty((*dxs.shape[:2], num_tokens, dxs.shape[3]))


def _setup_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, slots, host, ctx.numbers, ctx.rule, turns, ctx.distance = inputs
    ctx.save_for_backward(slots, host, turns)
    ctx.heads_inner = x.stride(1) < x.stride(2)


def _gather_backward(ctx: Any, dxs: Tensor) -> tuple[Tensor | None, ...]:
    slots, host, turns = ctx.saved_tensors
    dx = gather_documents_bwd(dxs, slots, host, ctx.numbers, ctx.rule, ctx.heads_inner, turns, ctx.distance)
    return dx, None, None, None, None, None, None


gather_documents_bwd = Operator(_gather_documents_backward, _empty_tokens)
gather_documents_fwd = Operator(_gather_documents, _empty_gathered, _setup_gather, _gather_backward)


def _scatter_documents(o: Tensor, slots: Tensor, host: Tensor, numbers: list[int], rule: str, mean: bool) -> Tensor:
    tables, windows = _tables(host, numbers, rule, o)
    out = _empty_out(o, slots, host, numbers, rule, mean)
    spread(o, out, slots, windows, shift=1, mean=mean, windows=tables.windows)
    return out


def _empty_out(o: Tensor, slots: Tensor, host: Tensor, numbers: list[int], rule: str, mean: bool) -> Tensor:
    return empty_heads_inner(o, numbers[0] * Packing(numbers, rule).shape.num_tokens)


def _scatter_documents_backward(
    dout: Tensor, slots: Tensor, host: Tensor, numbers: list[int], rule: str, mean: bool
) -> Tensor:
    tables, windows = _tables(host, numbers, rule, dout)
    # that of attention reads the rows that no tile fills too
    do = _empty_do(dout, slots, host, numbers, rule, mean).zero_()
    collect(dout, do, slots, windows, shift=1, mean=mean, windows=tables.windows)
    return do


def _empty_do(dout: Tensor, slots: Tensor, host: Tensor, numbers: list[int], rule: str, mean: bool) -> Tensor:
    return empty_heads_inner(dout, Packing(numbers, rule).capacity.rows)


def _setup_scatter(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, slots, host, ctx.numbers, ctx.rule, ctx.mean = inputs
    ctx.save_for_backward(slots, host)


def _scatter_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    slots, host = ctx.saved_tensors
    do = scatter_documents_bwd(dout, slots, host, ctx.numbers, ctx.rule, ctx.mean)
    return do, None, None, None, None, None


scatter_documents_bwd = Operator(_scatter_documents_backward, _empty_do)
scatter_documents_fwd = Operator(_scatter_documents, _empty_out, _setup_scatter, _scatter_backward)
