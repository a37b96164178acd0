"""Stages as operators: opaque to torch.compile, and quick to call from plain eager code.

The dispatcher and its layers of Python take longer on the CPU than the launch of the kernel they lead to. Where nobody
watches the dispatcher, an operator is therefore called as the function, or the autograd function, that it wraps; and
operators are defined one by one in a `Library` of torch, not by `custom_op`, which looks at all results of each call
for memory that they share with its arguments.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, library
from torch.autograd.function import once_differentiable

from lightning_lighthouse.attention.pyramid import PyramidShape

T = TypeVar("T")

PACKAGE = Path(__file__).parent.parent
# rooms whose modules define operators
ROOMS = ("attention", "context")


def edition(package: Path = PACKAGE) -> str:
    """What the sources of all operators come to, in 8 hexadecimal digits.

    torch keeps compiled graphs on disk, in which an operator's backward is a list of operators by name. Under a name
    that stays, code of today would be called as the code of a graph's time had it.
    """
    found = 0
    for path in sorted(path for room in ROOMS for path in (package / room).rglob("*.py")):
        found = zlib.crc32(path.read_bytes(), found)
    return f"{found:08x}"


NAMESPACE = f"lightning_lighthouse_{edition()}"
LIBRARY = library.Library(NAMESPACE, "FRAGMENT")
# the operators by their names
OPERATORS = getattr(torch.ops, NAMESPACE)


class Operator:
    """A custom operator of torch that plain eager code reaches directly.

    Args:
        forward: The implementation; its annotations make the schema, its name without underscores the operator's.
        fake: The same without the kernels: memory of the right shape and strides.
        setup_context: As in `torch.autograd.Function`; together with `backward`.
        backward: As in `torch.autograd.Function`. None: no gradient.
        keeps: Only the first output is a result, and the others are there to be saved: no caller sees them.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        fake: Callable[..., Any],
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        *,
        keeps: bool = False,
    ) -> None:
        name = forward.__name__.strip("_")
        schema = library.infer_schema(forward, mutates_args=())
        LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        # Dynamo would else trace what compiled code calls
        LIBRARY.impl(name, torch._disable_dynamo(forward), "CompositeExplicitAutograd")
        self.op = getattr(OPERATORS, name).default
        library.register_fake(self.op, fake, lib=LIBRARY)
        self.forward = forward
        self.keeps = keeps
        self.direct = forward
        if backward is None:
            library.register_autograd(self.op, _no_gradient, lib=LIBRARY)
        else:
            assert setup_context is not None
            library.register_autograd(self.op, once_differentiable(backward), setup_context=setup_context, lib=LIBRARY)
            self.direct = _autograd_function(forward, setup_context, backward, keeps)

    @staticmethod
    def is_watched(x: Tensor) -> bool:
        """Whether somebody is to see the operator itself: a compiler, a mode, a transform, or the class of a tensor."""
        return (
            torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack() > 0
            or torch._C._are_functorch_transforms_active()
            or type(x) not in (Tensor, torch.nn.Parameter)
        )

    def __call__(self, x: Tensor, *arguments: Any) -> Any:
        if self.is_watched(x):
            output = self.op(x, *arguments)
            return output[0] if self.keeps else output
        if torch.is_grad_enabled():
            return self.direct(x, *arguments)
        output = self.forward(x, *arguments)
        return output[0] if self.keeps else output


def _no_gradient(*_: Any) -> NoReturn:
    raise RuntimeError("cannot differentiate: no autograd formula was registered for this operator")


def _autograd_function(
    forward: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any], keeps: bool
) -> Callable[..., Any]:
    backward_once = once_differentiable(backward)

    # torch calls a separate setup_context only after inspecting the signature of forward, every time
    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)
            setup_context(ctx, inputs, output)
            return output[0] if keeps else output

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            # without gradients of gradients there is nothing to forbid
            return (backward_once if torch.is_grad_enabled() else backward)(ctx, *gradients)

    return Direct.apply


def remembered(function: Callable[..., T]) -> Callable[..., T]:
    """The function, its last results remembered; not for Dynamo, which cannot trace this."""
    cached = lru_cache(maxsize=256)(function)

    @wraps(function)
    def call(*arguments: Any) -> T:
        try:
            return cached(*arguments)
        except TypeError:
            # symbols, as a trace has them for sizes that change, have no hash
            return function(*arguments)

    return call


def empty_heads_inner(x_BHRD: Tensor, rows: int) -> Tensor:
    """Uninitialised `[B, H, rows, D]` whose memory is `[B, rows, H, D]`, which a model reshapes for free."""
    batch, heads, _, dim = x_BHRD.shape
    # not a transposed view: a view from inside an autograd function cannot be changed in place
    return x_BHRD.new_empty_strided((batch, heads, rows, dim), (rows * heads * dim, dim, heads * dim, 1))


def pack(shape: PyramidShape) -> list[int]:
    """A shape as the flat integers that an operator can take."""
    return [shape.num_tokens, shape.num_levels, shape.pooling_factor, shape.num_tiles, shape.tile_entries,
            *shape.winners]  # fmt: skip


def unpack(sizes: list[int]) -> PyramidShape:
    """The inverse of `pack`."""
    return _unpack(*sizes)


# inside of operators, where Dynamo does not look
@remembered
def _unpack(*sizes: int) -> PyramidShape:
    tokens, levels, factor, tiles, tile_entries, *winners = sizes
    return PyramidShape(tokens, levels, factor, tiles, tile_entries, tuple(winners))
