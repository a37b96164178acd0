"""Lighthouse Attention in plain PyTorch: the specification in code (arXiv 2605.06554; docs/understand/design.md).

The stages on one layout, `[B, H, N, D]`: score > select > gather (which pools) > attend > scatter. Attention itself is
stock SDPA and lives in `attention.py`; the others have twins of the same names in `kernels/`, with scores and
selections of their own. Clarity comes before speed: this file is what the kernels are tested against. It imports torch,
`config`, `rotation` and `winners` only.
"""

# B batch, H query heads, G key/value heads, N tokens, D head dim, T tiles, C candidates or winners of a tile,
# S gathered entries, M entries of all levels; p pooling factor

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lighthouse.attention import selections as winners
from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.attention.pyramid import PyramidShape, ceil_div
from lightning_lighthouse.attention.rotation import Rotation

# Whether all stages can run as one operator
FUSED = False


class Selection(NamedTuple):
    """Which entries are gathered, in the order of the gathered sequence.

    Args:
        index: `[B, G, S]` int32, positions in the concatenation of all levels.
        slots: `[B, G, M]` int32, the inverse: entry -> position in the gathered sequence, -1 where not gathered.
    """

    # shadows a method of tuple that nobody needs here
    index: Tensor  # type: ignore[assignment]
    slots: Tensor


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of scores, means and sums: fp32 for anything narrower."""
    return torch.promote_types(dtype, torch.float32)


Scores = list[tuple[Tensor, Tensor]]


def score(q_BHND: Tensor, k_BGND: Tensor, v_BGND: Tensor, shape: PyramidShape, config: LighthouseConfig) -> Scores:
    """Scores `(s_q, s_k)` of every level, each `[B, G, entries(level)]`: norms of the tokens, maxima above them.

    Under grouped heads a token's s_q is the maximum over the query heads of its group. The norm scorer does not read v;
    others do. A selection that compares no scores gets one pair of them, `[B, G, 0]`.
    """
    groups = k_BGND.shape[1]
    dtype = sum_dtype(q_BHND.dtype)
    if not config.reads_scores:
        nothing = k_BGND.new_empty((*k_BGND.shape[:2], 0), dtype=dtype)
        return [(nothing, nothing)]
    s_q = torch.linalg.vector_norm(q_BHND, dim=-1, dtype=dtype)
    s_k = torch.linalg.vector_norm(k_BGND, dim=-1, dtype=dtype)
    s_q = s_q.unflatten(1, (groups, -1)).amax(dim=2)

    return pool_scores(s_q, s_k, shape, config)


def pool_scores(s_q_BGN: Tensor, s_k_BGN: Tensor, shape: PyramidShape, config: LighthouseConfig) -> Scores:
    """Scores of every level from those of the tokens: maxima over windows; under "causal" that of the first token.

    Padding scores 0.
    """
    pad = shape.padded_tokens - shape.num_tokens
    s_q, s_k = F.pad(s_q_BGN, (0, pad)), F.pad(s_k_BGN, (0, pad))
    levels = [(s_q, s_k)]
    for _ in range(1, shape.num_levels):
        s_q, s_k = (s.unflatten(2, (-1, shape.pooling_factor)) for s in levels[-1])
        if config.selection == "causal":
            levels.append((s_q[..., 0], s_k[..., 0]))
        else:
            levels.append((s_q.amax(-1), s_k.amax(-1)))
    return levels


def select(
    scores: Scores,
    shape: PyramidShape,
    config: LighthouseConfig,
    step: Tensor | None = None,
    first_head: int = 0,
) -> Selection:
    """Choose the gathered entries, coarse to fine, in contiguous tiles (algorithm of section 3.2).

    All candidates are gathered. At each level above the tokens some win (`winners.py` has the rules), and the children
    of the winners are the candidates one level below. `step`, 0-dim int64, is what selection="random" draws for, None
    is step 0; `first_head` is the number that it gives to the first key/value head.
    """
    tiles = torch.arange(shape.num_tiles * shape.tile_entries, device=scores[0][0].device).view(shape.num_tiles, -1)
    return _order(*_candidates(scores, tiles, shape.winners, shape, config, step, first_head), shape)


def select_document(
    scores: Scores,
    shape: PyramidShape,
    config: LighthouseConfig,
    step: Tensor | None = None,
    first_head: int = 0,
) -> Selection:
    """As `select`, for a document inside a longer sequence, of a shape by `PyramidShape.of_document`.

    Under "published" and "random" the last tile ends where the document does, and has winners in proportion: a short
    document would else win as a whole. The other rules see no end, for it would be a later token to them.
    """
    last_tile = shape.num_tiles - 1
    rest = ceil_div(shape.num_tokens, shape.window(shape.num_levels - 1)) - last_tile * shape.tile_entries
    if config.selection in ("causal", "strided") or rest == shape.tile_entries:
        return select(scores, shape, config, step, first_head)
    entries = torch.arange(last_tile * shape.tile_entries + rest, device=scores[0][0].device)
    whole, last = entries[:-rest].view(last_tile, shape.tile_entries), entries[-rest:].view(1, -1)
    fewer = tuple(ceil_div(rest * count, shape.tile_entries) for count in shape.winners)
    parts = [_candidates(scores, last, fewer, shape, config, step, first_head)]
    if last_tile:
        parts.append(_candidates(scores, whole, shape.winners, shape, config, step, first_head))
    entries, levels = (torch.cat(some, -1) for some in zip(*parts, strict=True))
    return _order(entries, levels, shape)


def _candidates(
    scores: Scores,
    coarsest_TC: Tensor,
    counts: tuple[int, ...],
    shape: PyramidShape,
    config: LighthouseConfig,
    step: Tensor | None,
    first_head: int,
) -> tuple[Tensor, Tensor]:
    """All candidates of tiles with `counts` winners at each level, and their levels, each `[B, G, .]`."""
    batch, groups = scores[0][0].shape[:2]
    p = shape.pooling_factor
    candidates = coarsest_TC.expand(batch, groups, -1, -1)
    gathered_entries, gathered_levels = [], []
    for level in range(shape.num_levels - 1, -1, -1):
        gathered_entries.append(candidates.flatten(2))
        gathered_levels.append(torch.full_like(gathered_entries[-1], level))
        if level == 0:
            break
        won = candidates.gather(-1, _win(scores, candidates, level, counts[level], config, step, first_head))
        children = won.unsqueeze(-1) * p + torch.arange(p, device=won.device)
        candidates = children.flatten(-2)

    return torch.cat(gathered_entries, -1), torch.cat(gathered_levels, -1)


def _win(
    scores: Scores,
    candidates_BGTC: Tensor,
    level: int,
    count: int,
    config: LighthouseConfig,
    step: Tensor | None,
    first_head: int,
) -> Tensor:
    """Positions of the winners among the candidates, ascending: `[B, G, T, C] -> [B, G, T, count]`."""
    if config.selection == "strided":
        return winners.strided(candidates_BGTC, count)
    if config.selection == "random":
        return winners.random(candidates_BGTC, count, level, config, step, first_head)
    s_q, s_k = (s.gather(2, candidates_BGTC.flatten(2)).view_as(candidates_BGTC) for s in scores[level])
    if config.selection == "causal":
        return winners.causal(s_q, s_k, count)
    if config.cover_prefix:
        s_q = s_q.masked_fill(candidates_BGTC == 0, torch.inf)
    return winners.published(s_q, s_k, count)


def _order(entries: Tensor, levels: Tensor, shape: PyramidShape) -> Selection:
    """Sort entries by the last token they cover, finer first: a post-order walk, causal under a triangular mask."""
    window = torch.tensor([shape.window(level) for level in range(shape.num_levels)], device=entries.device)
    start = torch.tensor([shape.start(level) for level in range(shape.num_levels)], device=entries.device)
    last_token = (entries + 1) * window[levels] - 1
    order = (last_token * shape.num_levels + levels).argsort(-1)
    index = (start[levels] + entries).gather(-1, order)

    position = torch.arange(index.shape[-1], device=index.device, dtype=torch.int32).expand_as(index)
    slots = torch.full((*index.shape[:2], shape.num_entries), -1, dtype=torch.int32, device=index.device)
    return Selection(index.int(), slots.scatter(-1, index, position))


def gather(
    q_BHND: Tensor,
    k_BGND: Tensor,
    v_BGND: Tensor,
    selection: Selection,
    shape: PyramidShape,
    rotation: Rotation | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pool q, k and v alike and take the selected entries: `[B, H, N, D] -> [B, H, S, D]`.

    An entry is the mean over its window. Padding counts as zeros and every entry is divided by its whole window. Under
    a rotation the tokens of q and k are first rotated on to the last one of the window.
    """
    qs_BHSD, ks_BGSD = (_gather_one(x, selection, shape, rotation) for x in (q_BHND, k_BGND))
    return qs_BHSD, ks_BGSD, _gather_one(v_BGND, selection, shape, None)


def _gather_one(x_BHND: Tensor, selection: Selection, shape: PyramidShape, rotation: Rotation | None) -> Tensor:
    dtype = sum_dtype(x_BHND.dtype)
    padded = F.pad(x_BHND, (0, 0, 0, shape.padded_tokens - shape.num_tokens)).to(dtype)
    levels = []
    for level in range(shape.num_levels):
        window = shape.window(level)
        windows = padded.unflatten(2, (-1, window))
        if rotation is not None and level > 0:
            windows = rotation.turn(windows, rotation.within(window, windows))
        levels.append(windows.mean(3))
    pyramid_BHMD = torch.cat(levels, dim=2)
    rows_BHS = _per_query_head(selection.index, x_BHND.shape[1])
    return _take_rows(pyramid_BHMD, rows_BHS).to(x_BHND.dtype)


def scatter(
    o_BHSD: Tensor, selection: Selection, shape: PyramidShape, config: LighthouseConfig, front: int = 0
) -> Tensor:
    """Return the outputs to the tokens: `[B, H, S, D] -> [B, H, N - F, D]`.

    Entry (l, i) adds to tokens `[i p^l + p^l - 1, i p^l + 2 p^l - 2]`, cut at N - 1: the shift keeps a summary from
    the tokens of its own window, whose future it contains. Seen from a token, each level has at most one such entry.
    The F tokens of the first `front` coarsest windows are left out.
    """
    dtype = sum_dtype(o_BHSD.dtype)
    tokens = torch.arange(front * shape.window(shape.num_levels - 1), shape.num_tokens, device=o_BHSD.device)
    out_BHND = torch.zeros((), dtype=dtype, device=o_BHSD.device)
    fan_in_BHN1 = torch.zeros((), dtype=dtype, device=o_BHSD.device)
    for level in range(shape.num_levels):
        # floor division: the first tokens belong to entry -1 of a level, which does not exist
        entry_N = torch.div(tokens - shape.window(level) + 1, shape.window(level), rounding_mode="floor")
        slots_BGN = selection.slots[:, :, shape.start(level) + entry_N.clamp(min=0)].masked_fill(entry_N < 0, -1)
        slots_BHN = _per_query_head(slots_BGN, o_BHSD.shape[1])
        present_BHN1 = (slots_BHN >= 0).unsqueeze(-1)
        rows_BHND = _take_rows(o_BHSD, slots_BHN.clamp(min=0)).to(dtype)
        out_BHND = out_BHND + rows_BHND.masked_fill(~present_BHN1, 0)
        fan_in_BHN1 = fan_in_BHN1 + present_BHN1
    if config.combine == "mean":
        out_BHND = out_BHND / fan_in_BHN1.clamp(min=1)
    return out_BHND.to(o_BHSD.dtype)


def _per_query_head(x_BGS: Tensor, heads: int) -> Tensor:
    return x_BGS.repeat_interleave(heads // x_BGS.shape[1], dim=1)


def _take_rows(x_BHRD: Tensor, rows_BHS: Tensor) -> Tensor:
    return x_BHRD.gather(2, rows_BHS.long().unsqueeze(-1).expand(-1, -1, -1, x_BHRD.shape[-1]))


def window_mask(num_tokens: int, window: int, sink_tokens: int, device: torch.device | None = None) -> Tensor:
    """`[N, N]`, True where a token sees another: itself, the `window - 1` before it, and the first `sink_tokens`."""
    query_N1, key_N = torch.arange(num_tokens, device=device).unsqueeze(1), torch.arange(num_tokens, device=device)
    return (key_N <= query_N1) & ((key_N > query_N1 - window) | (key_N < sink_tokens))


def window_reference(
    q_BHND: Tensor, k_BGND: Tensor, v_BGND: Tensor, window: int, *, sink_tokens: int = 0, scale: float | None = None
) -> Tensor:
    """What `window_attention` returns, in the dtype of its inputs, by all N x N logits: `[B, H, N, D]`."""
    scale = q_BHND.shape[3] ** -0.5 if scale is None else scale
    k_BHND, v_BHND = (_per_query_head(x, q_BHND.shape[1]) for x in (k_BGND, v_BGND))
    mask_NN = window_mask(q_BHND.shape[2], window, sink_tokens, q_BHND.device)
    return (q_BHND @ k_BHND.mT * scale).masked_fill(~mask_NN, -torch.inf).softmax(-1) @ v_BHND
