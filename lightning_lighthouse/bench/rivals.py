"""What others offer for windows and chunks: torch's varlen_attn, and FlexAttention with a block mask.

Both are set up here and called elsewhere, so that bounds, masks and compilation stay out of the times.
"""

# N tokens, M blocks of tokens, C tokens of a block

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from lightning_lighthouse.bench.agreement import Attend
from lightning_lighthouse.bench.timing import Layer

# Tokens of a block of the mask: FlexAttention's own choice
BLOCK = 128


def varlen_attention(layer: Layer, num_tokens: int, kind: str, window: int) -> Attend | None:
    """`varlen_attn` over one sequence with a window, or over chunks as sequences; None where torch has none for this.

    It knows no sinks, and takes 16 bits on CUDA.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    takes_windows = "window_size" in inspect.signature(varlen_attn).parameters
    is_served = layer.device.type == "cuda" and layer.dtype.itemsize == 2 and layer.heads == layer.kv_heads
    if not (takes_windows and is_served):
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
