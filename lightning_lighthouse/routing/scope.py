"""What a routed call reads, and what it leaves: the only thing that a patch and the calls have in common.

`patch` writes it, `layers` and `calls` read it, and neither side imports the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.attention.documents import Documents
from lightning_lighthouse.attention.rotation import Rotation

if TYPE_CHECKING:
    from lightning_lighthouse.routing.audit import Audit
    from lightning_lighthouse.routing.score_spread import SpreadMeter

# Those of all patches that are not restored yet.
scopes: list[Scope] = []


class Shared:
    """Kept by patched modules: one for all copies of a model in a process, and none for a pickled one."""

    # An EMA copy of a patched model follows the original: on with it, dense once it is restored.
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


@dataclass(frozen=True)
class Settings:
    """What a routed call is told, by the type of its layer. Frozen: compiled frames take its numbers for constants.

    Args:
        config: Of Lighthouse Attention; its `sdpa` is that of windows and chunks too.
        window: Of the types "window" and "chunk"; None where there are none.
        sink_tokens: Of the type "window".
    """

    config: LighthouseConfig
    window: int | None = None
    sink_tokens: int = 0


class Rotary(Shared, ABC):
    """How the layers of a model rotate q and k; routing/rotary.py has the kinds."""

    @abstractmethod
    def rotation(self, q: Tensor) -> Rotation:
        """As q, `[..., D]`, was rotated."""


class Scope(Shared):
    """The state of one patch that its calls depend on.

    Args:
        settings: What the calls are told.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.is_on = False
        # Whether calls without gradients in eval mode are routed too.
        self.with_inference = False
        # Collects notes while a layer is routed that was not judged yet.
        self.audit: Audit | None = None
        # Measures what the scores of a batch have to rank, where somebody asks; eager only.
        self.spread: SpreadMeter | None = None
        # Of the routed layers, found once a config asks for it.
        self.rotary: Rotary | None = None
        # Those of the batch that runs, until its backward is done; None: a sequence is one.
        self.documents: Documents | None = None
        # Whether a call without them would be a mistake: training under documents=True.
        self.demands_documents = False
        # Collects notes from the first documents on.
        self.documents_audit: Audit | None = None
        # The type of the routed module that runs, "" outside of one; while documents are set, that of each module that
        # is patched, DENSE or UNSELECTED too. Set and reset by it. A plain value that returns to what it was: Dynamo
        # refuses any other side effect inside activation checkpointing.
        self.layer_type = ""
        # What became of the calls since they were last counted: in eager code of each, in compiled code when traced.
        self.calls: Counter[str] = Counter()
        # Eager only: the routed module that runs, and what autograd looked like when it started.
        self.layer: nn.Module | None = None
        self.autograd_mark: Any = None
        # A tensor: compiled frames read it anew each time. On the CPU: kernels get its value without a synchronisation.
        self.step = torch.zeros((), dtype=torch.int64, device="cpu")


# The type of a layer that `select` leaves out: what it can keep inside documents it does, and the rest is as it was.
UNSELECTED = "unselected"


def is_without_gradients() -> bool:
    """Whether gradients are off, and not only for the first of two forwards of a reentrant checkpoint.

    Such a forward runs in an autograd function, which turns forward-mode gradients off too; `torch.no_grad` does not.
    """
    if torch.is_grad_enabled():
        return False
    return torch.is_inference_mode_enabled() or torch._C._is_fwd_grad_enabled()


def autograd_mark() -> tuple[bool, Any]:
    """Differs between a module's forward and the body of a `checkpoint()` inside it.

    The recompute of such a body runs outside the module, so it would be dense after a routed forward: wrong gradients
    without an error. Calls inside it therefore stay dense both times.
    """
    top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return torch.is_grad_enabled(), top_hooks(True) if top_hooks else None


@torch.compiler.assume_constant_result
def note(reason: str) -> None:
    """Leave a note in the scope that is entered. Runs at trace time while compiling, on every call in eager."""
    noting = [scope for scope in scopes if scope.is_on or scope.documents is not None]
    # while a frame is traced, what is entered is Dynamo's alone: no scope shows it
    for scope in [scope for scope in noting if scope.layer_type] or noting:
        scope.calls[reason] += 1
        for audit in (scope.audit if scope.is_on else None, scope.documents_audit):
            if audit is not None:
                audit.add(scope.layer, reason)
