"""Which candidates of a tile win: one function a `selection`, in plain PyTorch (docs/understand/design.md, section 3).

Each returns the positions of the winners among the candidates, ascending: `[..., T, C] -> [..., T, count]`. Candidates
are in the order of the sequence. The Triton twins are `kernels/select.py` and `kernels/causal.py`.
"""

# B batch, G key/value heads, T tiles, C candidates of a tile

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.attention.hashing import mix

# Random keys have 30 bits, and entry 0 the key above them
KEY_SHIFT = 2
COVERED = 2**30


def published(s_q: Tensor, s_k: Tensor, count: int) -> Tensor:
    """Half of the winners, rounded up, by the highest s_q; the others by the highest s_k among the rest.

    Ties go to the lower entry, NaN ranks below everything.
    """
    by_q = _descending(s_q)[..., : (count + 1) // 2]
    won = torch.zeros_like(s_q, dtype=torch.bool).scatter(-1, by_q, True)
    # the rest, best s_k first: a stable sort by "already won" keeps the order of s_k within the rest
    order_k = _descending(s_k)
    order_k = order_k.gather(-1, torch.argsort(won.gather(-1, order_k).int(), dim=-1, stable=True))
    by_k = order_k[..., : count // 2]
    return torch.cat((by_q, by_k), -1).sort(-1).values


def _descending(scores: Tensor) -> Tensor:
    return torch.argsort(_without_nan(scores), dim=-1, descending=True, stable=True)


def _without_nan(scores: Tensor) -> Tensor:
    return scores.masked_fill(scores.isnan(), -torch.inf)


def causal(s_q: Tensor, s_k: Tensor, count: int) -> Tensor:
    """Candidates that reach the threshold of the tile before, first by s_q, then, of the rest, by s_k.

    Whether a candidate wins depends on the scores up to its own and on nothing later. The first tile has no threshold
    to reach: its winners are evenly spaced, by s_q and by s_k in turn.
    """
    s_q, s_k = _without_nan(s_q), _without_nan(s_k)
    evenly = strided(s_q[..., :1, :], count)
    everything = torch.ones_like(s_q, dtype=torch.bool)
    by_q = _first_tile(_reach(s_q, everything, (count + 1) // 2), evenly[..., ::2])
    by_k = _first_tile(_reach(s_k, ~by_q, count // 2), evenly[..., 1::2])
    # False before True, and in each the order of the sequence
    return torch.argsort((~(by_q | by_k)).int(), dim=-1, stable=True)[..., :count]


def _first_tile(won: Tensor, positions: Tensor) -> Tensor:
    first = torch.zeros_like(won[..., :1, :]).scatter(-1, positions, True)
    return torch.cat((first, won[..., 1:, :]), -2)


def _reach(scores: Tensor, rest: Tensor, count: int) -> Tensor:
    """Which of the rest win: the first `count` that reach the threshold, and the tile's last ones if too few do.

    The threshold is the count-th highest score among the rest of the tile before.
    """
    ranked = scores.masked_fill(~rest, -torch.inf).sort(-1, descending=True).values
    threshold = ranked[..., max(count, 1) - 1].roll(1, -1)
    hit = rest & (scores >= threshold.unsqueeze(-1))
    before = (hit.cumsum(-1) - hit.int()).clamp(max=count)
    left = rest.sum(-1, keepdim=True) - rest.cumsum(-1) + 1
    return rest & ((hit & (before < count)) | (left <= count - before))


def strided(candidates: Tensor, count: int) -> Tensor:
    """Evenly spaced candidates, the first one among them: ranks floor(m C / count), m = 0, 1, ..., count - 1."""
    ranks = torch.arange(count, device=candidates.device) * candidates.shape[-1] // count
    return ranks.expand(*candidates.shape[:-1], -1)


def random(
    candidates_BGTC: Tensor,
    count: int,
    level: int,
    config: LighthouseConfig,
    step: Tensor | None = None,
    first_head: int = 0,
) -> Tensor:
    """Candidates with the highest keys; a key is a hash of the seed, the step, the level, the head and the entry.

    The key/value heads are `first_head` and those that follow it.
    """
    head = first_head + torch.arange(candidates_BGTC.shape[1], device=candidates_BGTC.device).view(-1, 1, 1)
    state = mix(mix(0, config.seed), 0 if step is None else step)
    keys = mix(mix(mix(state, level), head), candidates_BGTC) >> KEY_SHIFT
    if config.cover_prefix:
        keys = keys.masked_fill(candidates_BGTC == 0, COVERED)
    return torch.argsort(keys, dim=-1, descending=True, stable=True)[..., :count].sort(-1).values
