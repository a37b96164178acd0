"""What operators make of the numbers of a batch that lie on the host: once a batch, for all layers and heads.

An operator gets those numbers as a tensor on the CPU. Compiled frames then see a tensor of one shape, whatever it says,
and nobody waits for a GPU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from threading import Lock
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")

# Tables of a few batches: those of a step and of the validation in it, each for several settings.
_KEPT = 8
_made: OrderedDict[Hashable, tuple[Tensor, object]] = OrderedDict()
# the backward runs in a thread of its own
_lock = Lock()


def once_a_batch(host: Tensor, key: Hashable, device: torch.device, make: Callable[[], T]) -> T:
    """What `make` returned for this memory of `host`, `key` and the current stream of `device`.

    Args:
        host: On the CPU, and never written to again.
        key: What `make` depends on beside them.
        device: Where `make` puts its tensors.
        make: Called where it was not yet, or long ago.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    # as long as the tensor is kept here, no other one has its address
    name = (host.data_ptr(), host.numel(), key, device, stream)
    with _lock:
        if name in _made:
            _made.move_to_end(name)
            return _made[name][1]  # type: ignore[return-value]
    value = make()
    with _lock:
        _made[name] = host, value
        while len(_made) > _KEPT:
            _made.popitem(last=False)
    return value


def to_device(values: np.ndarray | Sequence[int], device: torch.device) -> Tensor:
    """Numbers as int32 on `device`, without waiting for it."""
    on_host = torch.from_numpy(np.asarray(values, dtype=np.int32))
    if device.type == "cuda":
        # torch keeps the pinned memory until the copy is done
        return on_host.pin_memory().to(device, non_blocking=True)
    return on_host.to(device)


def boundaries(host: Tensor) -> list[int]:
    """The first row of each document, and the end of the last one: what `Documents.host` says."""
    ends: list[int] = host[1 : int(host[0]) + 2].tolist()
    return ends
