"""`context_parallel`: attention over sequences that several ranks share, in plain PyTorch.

    with context_parallel(group):
        tokens = slice_tokens(tokens)
        loss = loss_of(model(tokens[:, :-1], positions=local_positions(n)), tokens[:, 1:])
        loss.backward()

Under Lightning the strategies in `training/context_strategies.py` do all of that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from lightning_lighthouse.attention.sdpa import stock_sdpa
from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.context.group import Context, entered
from lightning_lighthouse.routing.calls import causal_attention, swap, unswap
from lightning_lighthouse.routing.layers import replace_kept
from lightning_lighthouse.routing.targets import SDPA


@contextmanager
def context_parallel(group: dist.ProcessGroup) -> Iterator[Context]:
    """Let the ranks of `group` share each sequence inside, rank r of W the tokens `[r N / W, (r + 1) N / W)`.

    Every causal call of `F.scaled_dot_product_attention`, in a patched model or not, then attends over the whole
    sequence; every rank must make the same calls. Hold it until the backward pass is done, which exchanges too. With
    equal numbers of targets the mean over the ranks of local mean losses, and of their gradients, is that of the whole
    sequence.

    Args:
        group: Its size must divide the tokens of a sequence.

    Raises:
        SettingError: Somebody else has replaced SDPA, as torch's own context parallelism does.
        RuntimeError: Within, at a call that is not causal self-attention over this rank's tokens.
    """
    context = Context.of(group)
    with shared_sequences(context if context.size > 1 else None, ()):
        yield context


@contextmanager
def shared_sequences(context: Context | None, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, sequences are shared in `context`; None: by nobody.

    Args:
        context: The ranks that share them.
        layers: Attention modules, whose own copies of SDPA are replaced.
    """
    if context is None:
        yield
        return
    found = getattr(F, SDPA)
    if found is not stock_sdpa and found is not causal_attention:
        raise SettingError(
            f"F.{SDPA} was replaced by {getattr(found, '__module__', '')}.{getattr(found, '__qualname__', found)}, so "
            "that calls would not reach context parallelism: leave that out, as torch's own context_parallel"
        )
    with ExitStack() as undone:
        swap()
        undone.callback(unswap)
        # in eval mode layers of torch run a kernel of their own instead
        undone.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        for layer in layers:
            undone.callback(layer.__dict__.update, replace_kept(layer))
        undone.enter_context(entered(context))
        yield
