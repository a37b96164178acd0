"""What a Lighthouse layer is told, and the sizes that follow from it.

`LighthouseConfig` holds the values a user chooses; each is checked here and nowhere else. `PyramidShape` holds the
numbers that follow from them at one sequence length: tiles, winners per level, the length of the gathered sequence.
Both backends read their sizes from it, so they cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_type_hints

import torch

from lightning_lighthouse.attention.operators import remembered
from lightning_lighthouse.attention.pyramid import PyramidShape, _pyramid
from lightning_lighthouse.checks import check_type

# Winners of a tile at each level in the published code; a budget below twice this many is one tile.
TILE_WINNERS = 128
# The same under selection="causal": smaller, because each tile takes its thresholds from the one before.
CAUSAL_TILE_WINNERS = 32
# The default budget keeps one token in this many as a winner: the published 1536 at 98,304 tokens.
TOKENS_PER_WINNER = 64
# The default capacity for documents: one for each this many tokens. Where they are shorter, dense is faster.
TOKENS_PER_DOCUMENT = 256
MIN_DOCUMENTS = 16
# Lightning's seeds end here too.
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class LighthouseConfig:
    """Settings of Lighthouse Attention (arXiv 2605.06554, section 3). Plain scalars, so that YAML can hold them.

    Args:
        num_levels: Levels of the pyramid, the tokens included; at least 2.
        pooling_factor: Entries of one level pooled into one entry of the next; at least 2.
        top_k: Winners at each level, summed over the tiles; at least 1. None: `max(32, N // 64)`, rounded down to a
            multiple of 128 from 128 on, which is the published 1536 at N = 98,304.
        scorer: How entries are ranked. "norm": by the norms of q and k, without parameters. "dilated": by the norms of
            what attention returns when it runs on every `dilation`-th token, for models that normalise q and k; it
            costs two dense forward passes over `dilation`.
        dilation: Stride of the "dilated" scorer; at least 1. Not used by "norm".
        selection: Which candidates of a tile win (docs/understand/design.md, section 3). "causal": those that reach the
            thresholds of the tile before, scored by their first token; no output depends on a later token. Below 64
            winners there is one tile, and "causal" is "strided". "published": the paper's top-k, which lets a token's
            neighbourhood depend on later tokens. "strided": evenly spaced ones. "random": drawn by a hash of the
            seed, the step, the level, the key/value head and the entry. The last two read no scores.
        combine: How the outputs of several levels meet in one token. "sum" as published, or "mean".
        cover_prefix: Force entry 0 of every level to win, so that every token receives at least one output. Under
            "causal" and "strided" it wins in any case.
        seed: Seed of selection="random", at most 2^32 - 1.
        backend: "auto": Triton on CUDA, the reference elsewhere. "reference" or "triton": that one or an error.
        sdpa: Backend of the stock attention call. "auto": cuDNN on compute capability 9.0, torch's choice elsewhere.
        max_documents: Documents of a sequence that memory is kept for, on average over a batch; at least 1. A batch
            with more runs dense inside its documents. None: `max(16, N // 256)`. Not used without documents.
        rotate: How rotary positions and pooling meet. "before": q and k are pooled as they come, rotated. "after": an
            entry is the mean of its tokens unrotated, rotated at the last token that it covers; the frequencies come
            from the model (docs/understand/design.md, section 2).

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range.
    """

    num_levels: int = 3
    pooling_factor: int = 4
    top_k: int | None = None
    scorer: Literal["norm", "dilated"] = "norm"
    dilation: int = 4
    selection: Literal["published", "causal", "strided", "random"] = "causal"
    combine: Literal["sum", "mean"] = "sum"
    cover_prefix: bool = True
    seed: int = 0
    backend: Literal["auto", "reference", "triton"] = "auto"
    sdpa: Literal["auto", "cudnn", "flash", "efficient", "math"] = "auto"
    max_documents: int | None = None
    rotate: Literal["before", "after"] = "before"

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            check_type(field.name, getattr(self, field.name), hints[field.name])
        minima = {"num_levels": 2, "pooling_factor": 2, "top_k": 1, "dilation": 1, "seed": 0, "max_documents": 1}
        for name, minimum in minima.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}")
        if self.seed > MAX_SEED:
            raise ValueError(f"seed must be at most {MAX_SEED}, got {self.seed}")

    @property
    def reads_scores(self) -> bool:
        """Whether the selection compares scores; if not, none are computed."""
        return self.selection in ("published", "causal")

    def resolve_top_k(self, num_tokens: int) -> int:
        """Winners at each level for a sequence of `num_tokens` tokens."""
        if self.top_k is not None:
            return self.top_k
        budget = max(32, num_tokens // TOKENS_PER_WINNER)
        return budget if budget < TILE_WINNERS else budget // TILE_WINNERS * TILE_WINNERS

    def resolve_max_documents(self, num_tokens: int) -> int:
        """Documents of a sequence of `num_tokens` tokens that memory is kept for."""
        if self.max_documents is not None:
            return self.max_documents
        return max(MIN_DOCUMENTS, num_tokens // TOKENS_PER_DOCUMENT)

    def pyramid(self, num_tokens: int) -> PyramidShape:
        """The sizes of the pyramid over `num_tokens` tokens. Raises ValueError where they exceed int32."""
        tile_winners = CAUSAL_TILE_WINNERS if self.selection == "causal" else TILE_WINNERS
        top_k = self.resolve_top_k(num_tokens)
        num_tiles = max(1, top_k // tile_winners)
        # Dynamo traces the function itself
        make = _pyramid if torch.compiler.is_compiling() else _pyramid_once
        return make(self.num_levels, self.pooling_factor, top_k, num_tokens, num_tiles)


_pyramid_once = remembered(_pyramid)
