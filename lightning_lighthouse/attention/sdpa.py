"""The one door to torch's scaled dot-product attention, and the choice of the backend behind it.

`sdpa_priority` sets torch's order for a whole run, dense layers and validation included; `causal_sdpa` is the call
itself and sets the order around it only where the run did not. The backends are those of CUDA: on other devices there
is nothing to choose and the settings have no effect.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_lighthouse.attention.inputs import plain
from lightning_lighthouse.checks import quoted
from lightning_lighthouse.notices import log_once

# The builtin itself, not `F.scaled_dot_product_attention`: that name is swapped while a model is patched.
stock_sdpa = torch._C._nn.scaled_dot_product_attention

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# More batch elements than this are more blocks along a second axis than CUDA launches
MAX_BATCH = 65_535
# Hopper, where torch's own order does not put cuDNN first.
CUDNN_CAPABILITY = (9, 0)


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, backend: str) -> Tensor:
    """Stock causal SDPA with grouped heads.

    Where no fused kernel takes grouped heads but one takes equal numbers of heads, as in fp32 on CUDA, k and v are
    repeated for the query heads: that copy is small beside the S x S logits of the math backend.

    Args:
        q: `[B, Hq, N, D]`.
        k: `[B, Hkv, N, D]`.
        v: `[B, Hkv, N, D]`.
        scale: Factor of the attention logits; None: `D ** -0.5`.
        backend: "auto", or the one CUDA backend to run: "cudnn", "flash", "efficient" or "math".

    Returns:
        `[B, Hq, N, D]`.

    Raises:
        ValueError: The named backend cannot run this call.
    """
    return _attend(q, k, v, None, scale, *_plan_call(q, k, backend, is_masked=False))


def masked_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float | None, backend: str) -> Tensor:
    """Stock SDPA under a mask, with grouped heads as in `causal_sdpa`.

    Args:
        q: `[B, Hq, N, D]`.
        k: `[B, Hkv, K, D]`.
        v: `[B, Hkv, K, D]`.
        mask: `[N, K]` bool, True where a query sees a key.
        scale: Factor of the attention logits; None: `D ** -0.5`.
        backend: As in `causal_sdpa`.

    Returns:
        `[B, Hq, N, D]`.

    Raises:
        ValueError: The named backend cannot run this call.
    """
    return _attend(q, k, v, mask, scale, *_plan_call(q, k, backend, is_masked=True))


def _plan_call(q: Tensor, k: Tensor, backend: str, *, is_masked: bool) -> tuple[tuple[str, ...], bool]:
    """`_plan` for a call with these tensors; on other devices than CUDA there is nothing to plan."""
    if q.device.type != "cuda":
        return (), False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else q.dtype
    names, repeats, _ = _plan(backend, q.device, dtype, *_plain_sizes(q, k), torch.is_grad_enabled(), is_masked)
    return names, repeats


def backend_of(q: Tensor, k: Tensor, backend: str) -> tuple[str, bool]:
    """The name in BACKENDS of what runs causal attention of such tensors with its backward: "math" where not on CUDA.

    The second value says whether k and v must be repeated for the query heads first.

    Raises:
        ValueError: The named backend cannot run this call.
    """
    if q.device.type != "cuda":
        return "math", True
    _, repeats, chosen = _plan(backend, q.device, q.dtype, *_plain_sizes(q, k), True, False)
    return chosen, repeats


def kernel_of(q: Tensor, k: Tensor, backend: str) -> str | None:
    """The name in `sdpa_kernels.KERNELS` of what `causal_sdpa` runs, with its backward, for q `[B, H, S, D]`.

    None where it does more than call one of these kernels.

    Raises:
        ValueError: The named backend cannot run this call.
    """
    if q.is_cpu:
        return "cpu" if _cpu_kernel_is_enabled() else None
    if not q.is_cuda or q.shape[0] > MAX_BATCH:
        return None
    chosen, repeats = backend_of(q, k, backend)
    # flash gets head dims that are no multiple of 8 padded
    is_padded = chosen == "flash" and q.shape[3] % 8 != 0
    return None if chosen == "math" or repeats or is_padded else chosen


@torch.compiler.assume_constant_result
def _cpu_kernel_is_enabled() -> bool:
    return torch.backends.cuda.flash_sdp_enabled()


def _plain_sizes(q: Tensor, k: Tensor) -> tuple[int, int, int]:
    """Query heads, key/value heads and head dim as plain ints."""
    heads, groups, dim = plain(q.shape[1], k.shape[1], q.shape[3])
    return heads, groups, dim


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    names: tuple[str, ...],
    repeats: bool,
) -> Tensor:
    """The call: k and v repeated for the query heads or not, held to the backends `names` unless there are none.

    Without a mask it is causal.
    """
    if repeats:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    # a plain bool, also where Dynamo traces sizes as symbols
    grouped = False
    if q.shape[1] != k.shape[1]:
        grouped = True
    with sdpa_kernel([BACKENDS[name] for name in names], set_priority=True) if names else nullcontext():
        outs = [
            stock_sdpa(*part, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)
            for part in _launchable(q, k, v)
        ]
    outs = [keep_gradient_order(out) for out in outs]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def keep_gradient_order(out: Tensor) -> Tensor:
    """What SDPA returned, so that its gradient comes in the memory order of `out`, where cuDNN could need that."""
    if out.device.type == "cuda" and out.dtype in (torch.bfloat16, torch.float16) and out.requires_grad:
        return with_ordered_gradient(out)
    return out


def with_ordered_gradient(out: Tensor) -> Tensor:
    """The tensor, whose gradient goes on in the memory order of `out`; it may be changed in place."""
    if torch.compiler.is_compiling():
        traced: Tensor = _GradientLikeOutput.apply(out)
        return traced
    # the output of a function would be a view, which autograd forbids to change
    out.register_hook(partial(in_memory_order, strides=out.stride()))
    return out


class _GradientLikeOutput(torch.autograd.Function):
    """Hands its input on, and hands back the gradient in the memory order of that input.

    torch keeps one plan of cuDNN for all calls with equal sizes and strides of q, k and v. That of the backward holds
    the strides of the gradient too, which nobody compares: after a call with another order results would be wrong.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        ctx.strides = out.stride()
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return in_memory_order(gradient, ctx.strides)


def in_memory_order(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor itself, or a copy of it with these strides."""
    if x.stride() == strides:
        return x
    # the stride of a single element says nothing
    dims = zip(x.shape, x.stride(), strides, strict=True)
    if all(size == 1 or stride == wanted for size, stride, wanted in dims):
        return x
    return x.new_empty_strided(x.shape, strides).copy_(x)


def _launchable(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The tensors, cut along the batch where CUDA could not launch them at once, as with many short chunks."""
    if q.shape[0] <= MAX_BATCH:
        return [(q, k, v)]
    return list(zip(q.split(MAX_BATCH), k.split(MAX_BATCH), v.split(MAX_BATCH), strict=True))


@contextmanager
def sdpa_priority(choice: str) -> Iterator[None]:
    """Let every SDPA call of the process prefer `choice`; torch's own order returns at the end.

    A call that `choice` cannot serve takes the next backend in the order.

    Args:
        choice: "auto", "cudnn", "flash", "efficient" or "math".
    """
    before = torch._C._get_sdp_priority_order()
    order = _completed(_preferred(choice, _capability()), before)
    torch._C._set_sdp_priority_order(order)
    if torch.cuda.is_available():
        names = ", ".join(name for value in order for name in BACKENDS if BACKENDS[name].value == value)
        log_once(names, f"sdpa={quoted(choice)}: dense attention runs on the first of these that can: {names}")
    try:
        yield
    finally:
        torch._C._set_sdp_priority_order(before)


def _preferred(choice: str, capability: tuple[int, int] | None) -> list[str]:
    """Names of the preferred backends, best first; [] where torch's own order is best."""
    if choice != "auto":
        return [choice]
    if torch.are_deterministic_algorithms_enabled():
        # cuDNN's backward does not repeat bit for bit; flash's does in this mode (measured: docs/benchmarks.md)
        return ["flash", "efficient", "math"]
    return ["cudnn", "flash", "efficient", "math"] if capability == CUDNN_CAPABILITY else []


def _completed(names: list[str], order: list[int]) -> list[int]:
    first = [BACKENDS[name].value for name in names]
    return first + [backend for backend in order if backend not in first]


def _capability(device: torch.device | None = None) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


@torch.compiler.assume_constant_result
def _plan(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    grad: bool,
    is_masked: bool,
) -> tuple[tuple[str, ...], bool, str]:
    """The backends that the call must be held to, best first, () where the order of the process serves; whether k and
    v must be repeated for the query heads; and the backend that then runs."""
    enabled = (
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )
    deterministic = torch.are_deterministic_algorithms_enabled()
    order = tuple(torch._C._get_sdp_priority_order())
    call = (device, dtype, heads, kv_heads, head_dim, grad, is_masked)
    names, repeats, message, chosen = _plan_once(backend, order, enabled, deterministic, call)
    log_once(message, message)
    return names, repeats, chosen


@lru_cache(maxsize=256)
def _plan_once(
    backend: str, order: tuple[int, ...], enabled: tuple[bool, ...], deterministic: bool, call: tuple[Any, ...]
) -> tuple[tuple[str, ...], bool, str, str]:
    device, dtype, heads, kv_heads, head_dim, grad, is_masked = call
    preferred = _completed(_preferred(backend, _capability(device)), list(order))
    names = [name for value in preferred for name in BACKENDS if BACKENDS[name].value == value]
    # what the user turned off stays off, unless it is asked for by name
    is_enabled = dict(zip(BACKENDS, enabled, strict=True))
    names = [backend] if backend != "auto" else [name for name in names if is_enabled[name]]

    chosen = ask_torch(names, *call)
    repeats = False
    if heads != kv_heads and chosen in (None, "math"):
        with_equal_heads = ask_torch(names, device, dtype, heads, heads, head_dim, grad, is_masked)
        if with_equal_heads not in (None, "math"):
            names, chosen, repeats = [name for name in names if name != "math"], with_equal_heads, True
    mode = (", masked" if is_masked else "") + (", k and v repeated" if repeats else "")
    mode += ", deterministic" if deterministic else ""
    what = f"{dtype} on {device.type} with {heads} and {kv_heads} heads of {head_dim}{mode}"
    if chosen is None:
        raise ValueError(f"sdpa={quoted(backend)} cannot run attention in {what}; use sdpa='auto'")
    message = f"sdpa={quoted(backend)} runs {quoted(chosen)} for {what}"
    serves = backend == "auto" and list(order) == preferred and not repeats
    return (() if serves else tuple(names)), repeats, message, chosen


def ask_torch(
    names: list[str],
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    grad: bool,
    is_masked: bool,
) -> str | None:
    """The backend that torch takes for such a call, asked with a short one; None where it has none."""
    q, k, v = (
        torch.empty(1, count, 128, head_dim, dtype=dtype, device=device, requires_grad=grad)
        for count in (heads, kv_heads, kv_heads)
    )
    mask = torch.ones(128, 128, dtype=torch.bool, device=device) if is_masked else None
    with sdpa_kernel([BACKENDS[name] for name in names], set_priority=True):
        try:
            value = torch._fused_sdp_choice(q, k, v, mask, is_causal=mask is None, enable_gqa=heads != kv_heads)
        except RuntimeError:
            # torch names its reasons in warnings
            return None
    return next((name for name in BACKENDS if BACKENDS[name].value == value), None)
