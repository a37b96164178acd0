"""Local attention: windows that slide over the sequence, and chunks that do not see each other.

Both take and return what `lighthouse_attention` does, exactly, in memory O(N). A window runs on kernels of this package
where they can (`fused_window.py`: CUDA, 16 bits), elsewhere on stock SDPA over blocks (`blocked_window.py`). A chunk is
a reshape and stock causal SDPA.
"""

# B batch, H query heads, G key/value heads, N tokens, D head dim, M chunks, C tokens of a chunk

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lighthouse.attention.blocked_window import blocked_window
from lightning_lighthouse.attention.documents import Documents
from lightning_lighthouse.attention.documents_windows import chunks_inside, windows_inside
from lightning_lighthouse.attention.inputs import autocast, check_inputs
from lightning_lighthouse.attention.sdpa import BACKENDS, causal_sdpa
from lightning_lighthouse.checks import check_type, quoted
from lightning_lighthouse.notices import log_once, notice_once

# What the kernels take.
MIN_CAPABILITY = (8, 0)
MAX_HEAD_DIM = 256


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    sink_tokens: int = 0,
    scale: float | None = None,
    sdpa: str = "auto",
    documents: Documents | None = None,
) -> Tensor:
    """Causal self-attention in which a token sees itself, the `window - 1` tokens before it, and the sinks.

    Args:
        q: `[B, Hq, N, D]`; positional rotation already applied.
        k: `[B, Hkv, N, D]`, Hq a multiple of Hkv.
        v: `[B, Hkv, N, D]`.
        window: Tokens, at least 1. From `N - sink_tokens` on this is dense causal attention.
        sink_tokens: The first tokens of the sequence that all later ones see, also beyond the window; at least 0.
        scale: Factor of the attention logits; None: `D ** -0.5`.
        sdpa: "auto": the kernels of this package on CUDA in 16 bits, torch's choice elsewhere. "flash" is the same, for
            torch's own takes no sinks. Or the one CUDA backend to run on blocks under a mask: "cudnn", "efficient" or
            "math".
        documents: Of these sequences: each is attended to as a sequence of its own, sinks included. Those that
            are longer than a window and its sinks are a call each. None: a sequence is one.

    Returns:
        `[B, Hq, N, D]`, in the dtype of q, or that of autocast.

    Raises:
        TypeError: `window` or `sink_tokens` is no int, or `documents` are none.
        ValueError: `window` or `sink_tokens` is out of range, shapes, dtypes or devices do not fit together, the
            documents are of another batch, or the named backend cannot run this call.
    """
    _check_counts(sdpa, window=window, sink_tokens=sink_tokens)
    q, k, v = autocast(q, k, v)
    check_inputs(q, k, v)
    if documents is not None:
        attend = partial(window_attention, window=window, sink_tokens=sink_tokens, scale=scale, sdpa=sdpa)
        return windows_inside(attend, q, k, v, documents, window + sink_tokens, scale=scale, sdpa=sdpa)
    if window + sink_tokens >= q.shape[2]:
        return causal_sdpa(q, k, v, scale=scale, backend=sdpa)
    if _takes_kernel(q, sdpa):
        # they need Triton, which is imported only where it is used
        from lightning_lighthouse.attention.fused_window import fused_window

        return fused_window(q, k, v, window, sink_tokens=sink_tokens, scale=scale)
    return blocked_window(q, k, v, window, sink_tokens=sink_tokens, scale=scale, backend=sdpa)


def lower_right_window(
    q: Tensor, k: Tensor, v: Tensor, window: int, *, sink_tokens: int, scale: float | None, sdpa: str
) -> Tensor:
    """`window_attention` of the last M of N tokens, whose keys and values are given: `[B, Hq, M, D]`.

    Args:
        q: `[B, Hq, M, D]`, M at most N.
        k: `[B, Hkv, N, D]`.
        v: `[B, Hkv, N, D]`.
        window: As there.
        sink_tokens: As there.
        scale: As there.
        sdpa: As there.
    """
    num_front = k.shape[2] - q.shape[2]
    if window + sink_tokens < k.shape[2] and _takes_kernel(q, sdpa):
        from lightning_lighthouse.attention.fused_window import fused_window

        return fused_window(q, k, v, window, sink_tokens=sink_tokens, scale=scale)
    # blocks need queries of all tokens
    padded = F.pad(q, (0, 0, num_front, 0))
    return window_attention(padded, k, v, window, sink_tokens=sink_tokens, scale=scale, sdpa=sdpa)[:, :, num_front:]


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    scale: float | None = None,
    sdpa: str = "auto",
    documents: Documents | None = None,
) -> Tensor:
    """Causal self-attention inside chunks of `window` tokens that do not see each other; the last may be shorter.

    Args:
        q: `[B, Hq, N, D]`; positional rotation already applied.
        k: `[B, Hkv, N, D]`, Hq a multiple of Hkv.
        v: `[B, Hkv, N, D]`.
        window: Tokens of a chunk, at least 1.
        scale: Factor of the attention logits; None: `D ** -0.5`.
        sdpa: Backend of the stock attention call, as in `LighthouseConfig`.
        documents: Of these sequences: the chunks of each begin at its first token. None: a sequence is one.

    Returns:
        `[B, Hq, N, D]`, in the dtype of q, or that of autocast.

    Raises:
        TypeError: `window` is no int, or `documents` are none.
        ValueError: `window` is out of range, shapes, dtypes or devices do not fit together, the documents are of
            another batch, or the named backend cannot run this call.
    """
    _check_counts(sdpa, window=window)
    q, k, v = autocast(q, k, v)
    check_inputs(q, k, v)
    if documents is not None:
        return chunks_inside(q, k, v, documents, window, scale=scale, sdpa=sdpa)
    num_tokens = q.shape[2]
    if window >= num_tokens:
        return causal_sdpa(q, k, v, scale=scale, backend=sdpa)
    whole = num_tokens // window * window
    folded = (_fold(x[:, :, :whole], window) for x in (q, k, v))
    o_blocks = causal_sdpa(*folded, scale=scale, backend=sdpa)
    out_BHND = o_blocks.unflatten(0, (-1, whole // window)).transpose(1, 2).flatten(2, 3)
    if whole == num_tokens:
        return out_BHND
    rest = causal_sdpa(*(x[:, :, whole:] for x in (q, k, v)), scale=scale, backend=sdpa)
    return torch.cat((out_BHND, rest), 2)


def _fold(x_BHND: Tensor, window: int) -> Tensor:
    """Chunks become batch elements: `[B, H, M C, D] -> [B M, H, C, D]`."""
    return x_BHND.unflatten(2, (-1, window)).transpose(1, 2).flatten(0, 1)


def _check_counts(sdpa: str, **counts: int) -> None:
    for name, value in counts.items():
        check_type(name, value, int)
        least = 1 if name == "window" else 0
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if sdpa not in ("auto", *BACKENDS):
        raise ValueError(f"sdpa must be one of {', '.join(map(repr, ('auto', *BACKENDS)))}, got {quoted(sdpa)}")


def _takes_kernel(q: Tensor, sdpa: str) -> bool:
    """Whether the kernels run the windows; where they could be expected to and cannot, a notice says why."""
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16) or sdpa not in ("auto", "flash"):
        return False
    # a plain bool, also where Dynamo traces sizes as symbols
    is_wide = False
    if q.shape[3] > MAX_HEAD_DIM:
        is_wide = True
    return _has_kernel(q.device, is_wide)


@torch.compiler.assume_constant_result
def _has_kernel(device: torch.device, is_wide: bool) -> bool:
    obstacle = _obstacle(device, is_wide)
    if obstacle is None:
        log_once("window", "windows run on Triton kernels")
    else:
        notice_once(f"window {obstacle}", f"windows run on blocks under a mask, which is slow: {obstacle}")
    return obstacle is None


def _obstacle(device: torch.device, is_wide: bool) -> str | None:
    """What keeps the kernels from running on `device`; None: nothing."""
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"the kernels need compute capability 8.0, {device} has {capability[0]}.{capability[1]}"
    if is_wide:
        return f"the kernels take head dims up to {MAX_HEAD_DIM}"
    return None if find_spec("triton") else "the package triton is not installed"
