"""Do the norms of q and k leave the "norm" scorer anything to rank? Asked once a layer, while its patch is audited.

A model that normalises q and k gives all tokens nearly one norm, and the scorer then ranks rounding errors. In eager
code the spread is measured at the first routed call of each layer. A compiled layer is judged by its modules instead:
to measure there would change what is compiled. So is one inside a transform of torch.func, whose tensors end with it.
"""

# B batch, H heads, N tokens, D head dim, E entries of level 1

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.routing.reasons import ITSELF

# Coefficient of variation of a head's level-1 scores below which they hardly differ.
LEAST_SPREAD = 0.05
# The same where no norm of q and k is seen: a fresh projection to 128 channels spreads by 0.04 only, and learns.
LEAST_SPREAD_WITHOUT_NORMS = 0.01

_NORM = re.compile(r"(q|k|qk|query|key)_?(layer)?_?norm|(layer)?_?norm_?(q|k|qk|query|key)")
_REMEDY = "scorer='norm' ranks noise there; set scorer='dilated', or selection='strided', which needs no scores"


class ScoreSpread:
    """What the layers of one patch showed."""

    def __init__(self) -> None:
        # one flag for each head, on the device: nothing waits for it before `warning`
        self._flat: dict[nn.Module, Tensor] = {}

    def add(self, layer: nn.Module | None, q_BHND: Tensor, k_BGND: Tensor, config: LighthouseConfig) -> None:
        """Measure the first call of `layer`, where its norms are what `config` ranks."""
        if layer is None or layer in self._flat or not _is_measured(q_BHND, k_BGND, config):
            return
        least = LEAST_SPREAD if normalises(layer, q_BHND.shape[3]) else LEAST_SPREAD_WITHOUT_NORMS
        with torch.no_grad():
            q, k = _variations(q_BHND, k_BGND, config)
            self._flat[layer] = ((q < least) & (k < least)).flatten()

    def warning(self, layers: dict[str, nn.Module], config: LighthouseConfig) -> str:
        """One line if more than half of the heads have nothing to rank, else "". Waits for the device.

        Args:
            layers: The routed layers; those that were not measured count by their modules.
            config: Of the patch.
        """
        if not _ranks_norms(config):
            return ""
        measured = [self._flat[layer] for layer in layers.values() if layer in self._flat]
        if measured:
            flat = torch.cat([heads.cpu() for heads in measured])
            share = float(flat.float().mean())
            if share <= 0.5:
                return ""
            return (
                f"the norms of q and k hardly differ in {share:.0%} of {len(flat)} heads (coefficient of variation of "
                f"the level-1 scores below {LEAST_SPREAD}): {_REMEDY}"
            )
        named = [name for name, layer in layers.items() if normalises(layer, getattr(layer, "head_dim", None))]
        if 2 * len(named) <= len(layers):
            return ""
        return (
            f"{len(named)} of {len(layers)} layers normalise q and k ({named[0] or ITSELF}, ...), so that "
            f"their norms may hardly differ; compiled or transformed, they were not measured. Then {_REMEDY}"
        )


class SpreadMeter:
    """The spread of the scores in one training batch, for a curve of it."""

    def __init__(self) -> None:
        # of each head of q and of k, on the device: nothing waits for it before `mean`
        self._found: dict[nn.Module, Tensor] = {}

    def add(self, layer: nn.Module | None, q_BHND: Tensor, k_BGND: Tensor, config: LighthouseConfig) -> None:
        """Measure the first call of `layer`, where its norms are what `config` ranks."""
        if layer is None or layer in self._found or not _is_measured(q_BHND, k_BGND, config):
            return
        with torch.no_grad():
            self._found[layer] = torch.stack(_variations(q_BHND, k_BGND, config)).mean()

    def mean(self) -> float | None:
        """The mean coefficient of variation of the level-1 scores; None where nothing was measured. Waits."""
        return float(torch.stack(list(self._found.values())).mean()) if self._found else None


def normalises(layer: nn.Module, head_dim: int | None) -> bool:
    """Whether an attention module holds norms of q and k, by the names of its modules.

    Not one over all heads together, which leaves the heads of a token their differences; None: unknown.
    """
    for name, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        is_of_a_head = not isinstance(weight, Tensor) or head_dim is None or weight.numel() == head_dim
        if is_of_a_head and _NORM.fullmatch(name.rpartition(".")[2]):
            return True
    return False


def _ranks_norms(config: LighthouseConfig) -> bool:
    return config.scorer == "norm" and config.reads_scores


def _is_measured(q_BHND: Tensor, k_BGND: Tensor, config: LighthouseConfig) -> bool:
    # selective checkpointing keeps the results of some operators by their order: none may run in one pass alone
    if not _ranks_norms(config) or torch._C._len_torch_dispatch_stack() > 0:
        return False
    # what vmap wraps cannot be read once it is left
    if any(map(torch._C._functorch.is_functorch_wrapped_tensor, (q_BHND, k_BGND))):
        return False
    return config.pyramid(q_BHND.shape[2]).compresses


def _variations(q_BHND: Tensor, k_BGND: Tensor, config: LighthouseConfig) -> list[Tensor]:
    """Coefficients of variation of the level-1 scores by q and by k, each `[B, G]`."""
    groups = k_BGND.shape[1]
    return [_variation(_level_one(x, groups, config)) for x in (q_BHND, k_BGND)]


def _level_one(x_BHND: Tensor, groups: int, config: LighthouseConfig) -> Tensor:
    """Scores `[B, G, E]` of the whole windows of level 1."""
    whole = x_BHND.shape[2] // config.pooling_factor * config.pooling_factor
    # sums in float32, or wider where the model is
    dtype = torch.promote_types(x_BHND.dtype, torch.float32)
    norms = torch.linalg.vector_norm(x_BHND[:, :, :whole], dim=-1, dtype=dtype)
    windows = norms.unflatten(1, (groups, -1)).amax(2).unflatten(2, (-1, config.pooling_factor))
    return windows[..., 0] if config.selection == "causal" else windows.amax(-1)


def _variation(scores: Tensor) -> Tensor:
    return scores.std(-1, correction=0) / scores.mean(-1)
