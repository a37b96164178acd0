"""Launches that do not ask Triton each time which compiled kernel serves their arguments."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Launches that a file remembers; lengths that change with every batch must not fill the memory
MOST_KEPT = 1024


class Launch:
    """A launch of a Triton kernel of which all but the tensors is known.

    The arguments of the kernel are tensors, then numbers that change from launch to launch, other numbers, constants.

    Triton compiles for constants, for numbers of 32 or 64 bits, for the dtypes of tensors, and for whether numbers and
    addresses are multiples of 16. It takes some 20 us to find the compiled kernel by all of these at every launch; here
    the tensors alone are looked at.

    Args:
        kernel: By `triton.jit`.
        programs: How many run.
        numbers: Those that stay the same.
        constants: The arguments that are `tl.constexpr`.
        num_warps: Of one program.
    """

    def __init__(
        self, kernel: Any, programs: int, numbers: tuple[int, ...], constants: tuple[Any, ...], num_warps: int
    ) -> None:
        self.kernel = kernel
        self.grid = (programs, 1, 1)
        self.rest = (*numbers, *constants)
        self.num_warps = num_warps
        self.compiled: dict[tuple[Any, ...], Callable[..., None]] = {}

    def __call__(self, *tensors: Tensor | None, changing: tuple[int, ...] = ()) -> None:
        """Launch, on the device of the first tensor. `changing` numbers have 32 bits and are not specialised."""
        first = tensors[0]
        assert first is not None
        device = first.device.index
        if first.is_cuda and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(*tensors, changing=changing)
            return
        types = (device, *[x if x is None else (x.dtype, x.data_ptr() % 16 == 0) for x in tensors])
        run = self.compiled.get(types)
        if run is not None:
            run(*tensors, *changing, *self.rest)
            return
        compiled = self.kernel[self.grid](*tensors, *changing, *self.rest, num_warps=self.num_warps)
        # the interpreter compiles nothing
        if compiled is not None:
            self.compiled[types] = compiled[self.grid]


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Make the device of x current, for Triton launches on the current one."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()
