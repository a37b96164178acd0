"""What others offer for windows, chunks and documents: torch's varlen_attn, and FlexAttention with a block mask.

For windows and chunks both are set up here and called elsewhere, so that bounds, masks and compilation stay out of the
times. For documents bounds and masks are made in each call, as each batch has others.
"""

# N tokens, M blocks of tokens, C tokens of a block

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from lightning_lighthouse.attention.documents import Documents
from lightning_lighthouse.attention.host_tables import boundaries, to_device
from lightning_lighthouse.bench.agreement import Attend, DocumentAttend
from lightning_lighthouse.bench.timing import Layer

# Tokens of a block of the mask: FlexAttention's own choice
BLOCK = 128


def varlen_attention(layer: Layer, num_tokens: int, kind: str, window: int) -> Attend | None:
    """`varlen_attn` over one sequence with a window, or over chunks as sequences; None where torch has none for this.

    It knows no sinks, and takes 16 bits on CUDA.
    """
    varlen_attn = _varlen_attn(layer)
    if varlen_attn is None:
        return None
    starts = [0] if kind == "window" else range(0, num_tokens, window)
    bounds = torch.tensor([*starts, num_tokens], dtype=torch.int32, device=layer.device)
    longest = num_tokens if kind == "window" else min(window, num_tokens)
    window_size = (window - 1, 0) if kind == "window" else (-1, 0)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        out = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=window_size)
        assert isinstance(out, Tensor)
        return out.transpose(0, 1).unsqueeze(0)

    return attend


def varlen_documents(layer: Layer) -> DocumentAttend | None:
    """`varlen_attn` over the documents of one sequence, its bounds made in each call; None where torch has none."""
    varlen_attn = _varlen_attn(layer)
    if varlen_attn is None:
        return None

    def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        bounds, longest = to_device(boundaries(documents.host), q.device), documents.longest
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        out = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0))
        assert isinstance(out, Tensor)
        return out.transpose(0, 1).unsqueeze(0)

    return attend


def _varlen_attn(layer: Layer) -> Callable[..., Any] | None:
    """The function itself; None where torch has none with windows, or it does not take such a layer."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    takes_windows = "window_size" in inspect.signature(varlen_attn).parameters
    is_served = layer.device.type == "cuda" and layer.dtype.itemsize == 2 and layer.heads == layer.kv_heads
    return varlen_attn if takes_windows and is_served else None


class FlexDocuments:
    """FlexAttention inside the documents of one sequence, compiled when first called, each batch with its own mask.

    Args:
        layer: The layer.
        num_tokens: N.
    """

    def __init__(self, layer: Layer, num_tokens: int) -> None:
        # torch stops compiling a function after a few variants, and would then take N x N memory
        torch.compiler.reset()
        self._attend = torch.compile(flex_attention, dynamic=False)
        self._make_mask = torch.compile(create_block_mask, dynamic=False)
        self._is_grouped = layer.heads != layer.kv_heads
        self._num_tokens = num_tokens
        # one memory for all batches, so that all have one mask function, and nothing is compiled anew
        self._ids = ids = torch.zeros(num_tokens, dtype=torch.int64, device=layer.device)

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (ids[query] == ids[key])

        self._sees = sees

    def block_mask(self, documents: Documents) -> BlockMask:
        """The mask of a batch."""
        device = self._ids.device
        self._ids.copy_(documents.document_ids(device)[0])
        mask = self._make_mask(self._sees, None, None, self._num_tokens, self._num_tokens, device=device.type)
        assert isinstance(mask, BlockMask)
        return mask

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        """Attention, under a mask made for it."""
        mask = self.block_mask(documents)
        out: Tensor = self._attend(q, k, v, block_mask=mask, enable_gqa=self._is_grouped)
        return out


def flex(layer: Layer, num_tokens: int, kind: str, window: int, sink_tokens: int) -> Attend | None:
    """FlexAttention, compiled for this length and mask when it is first called; None where there is no GPU."""
    if layer.device.type != "cuda":
        return None
    # torch stops compiling a function after a few variants, and would then take N x N memory
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = block_mask(num_tokens, kind, window, sink_tokens, layer.device)
    is_grouped = layer.heads != layer.kv_heads
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=is_grouped)


def block_mask(num_tokens: int, kind: str, window: int, sink_tokens: int, device: torch.device) -> BlockMask:
    """The block mask of windows with sinks, or of chunks, without the N x N mask that torch would make it from."""

    def sees_window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & ((query - key < window) | (key < sink_tokens))

    def sees_chunk(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query // window == key // window)

    first = torch.arange(0, num_tokens, BLOCK, device=device)
    last = first + BLOCK - 1
    query_first, query_last, key_first, key_last = first[:, None], last[:, None], first, last
    is_below = query_first > key_last
    if kind == "window":
        is_touched = (query_first - key_last < window) | (key_first < sink_tokens)
        is_full = is_below & ((query_last - key_first < window) | (key_last < sink_tokens))
    else:
        is_touched = key_last // window >= query_first // window
        is_full = is_below & (key_first // window == query_last // window)
    is_partial = is_touched & (query_last >= key_first) & ~is_full
    sees = sees_window if kind == "window" else sees_chunk
    lengths = (num_tokens, num_tokens)
    return BlockMask.from_kv_blocks(
        *_table(is_partial), *_table(is_full), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=lengths
    )


def _table(chosen_MM: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys are chosen for each block of queries, and their numbers, those first."""
    order = chosen_MM.int().argsort(dim=-1, descending=True, stable=True)
    return chosen_MM.sum(-1)[None, None].int(), order[None, None].int()
