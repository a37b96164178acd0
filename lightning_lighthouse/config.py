"""What a Lighthouse layer is told, and the sizes that follow from it.

`LighthouseConfig` holds the values a user chooses; each is checked here and nowhere else. `PyramidShape` holds the
numbers that follow from them at one sequence length: tiles, winners per level, the length of the gathered sequence.
Both backends read their sizes from it, so they cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

# Winners of a tile at each level in the published code; a budget below twice this many is one tile.
TILE_WINNERS = 128
# The same under selection="causal": smaller, because each tile takes its thresholds from the one before.
CAUSAL_TILE_WINNERS = 32
# The default budget keeps one token in this many as a winner: the published 1536 at 98,304 tokens.
TOKENS_PER_WINNER = 64
# Entries are numbered in int32.
MAX_ENTRIES = 2**31 - 1
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
        selection: Which candidates of a tile win (docs/design.md, section 3). "causal": those that reach the
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

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            check_type(field.name, getattr(self, field.name), hints[field.name])
        minima = {"num_levels": 2, "pooling_factor": 2, "top_k": 1, "dilation": 1, "seed": 0}
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

    def pyramid(self, num_tokens: int) -> PyramidShape:
        """The sizes of the pyramid over `num_tokens` tokens. Raises ValueError where they exceed int32."""
        tile_winners = CAUSAL_TILE_WINNERS if self.selection == "causal" else TILE_WINNERS
        top_k = self.resolve_top_k(num_tokens)
        return _pyramid(self.num_levels, self.pooling_factor, top_k, num_tokens, max(1, top_k // tile_winners))


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raise TypeError or ValueError, quoting `value`, if it is not of the annotated type or one of its literals."""
    options = get_args(hint)
    if options and all(isinstance(option, str) for option in options):
        if value not in options:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")
        return
    allowed = options or (hint,)
    # bool is an int to Python, never to a reader of a recipe
    if type(value) not in allowed:
        names = " or ".join("None" if option is type(None) else option.__name__ for option in allowed)
        raise TypeError(f"{name} must be {names}, got {value!r}")


@dataclass(frozen=True)
class PyramidShape:
    """Sizes of one pyramid. Entry (l, i) covers tokens `[i p^l, (i+1) p^l - 1]`; level 0 is the tokens.

    Args:
        num_tokens: N, the length of the sequence.
        num_levels: L.
        pooling_factor: p.
        num_tiles: T, contiguous parts of the sequence that select independently.
        tile_entries: Coarsest entries of one tile, all of them candidates.
        winners: Winners of one tile at level l; index 0 is level 0, where nobody wins.
    """

    num_tokens: int
    num_levels: int
    pooling_factor: int
    num_tiles: int
    tile_entries: int
    winners: tuple[int, ...]

    @property
    def padded_tokens(self) -> int:
        """Tokens after padding on the right to whole tiles of whole coarsest entries."""
        return self.num_tiles * self.tile_entries * self.window(self.num_levels - 1)

    def window(self, level: int) -> int:
        """Tokens that an entry of `level` covers."""
        return self.pooling_factor**level

    def entries(self, level: int) -> int:
        """Entries of `level`, padding included."""
        return self.padded_tokens // self.window(level)

    def start(self, level: int) -> int:
        """Position of entry (level, 0) in the concatenation of all levels, finest first."""
        return sum(self.entries(finer) for finer in range(level))

    def candidates(self, level: int) -> int:
        """Candidates of one tile at `level`: everything at the coarsest, the winners' children below."""
        if level == self.num_levels - 1:
            return self.tile_entries
        return self.pooling_factor * self.winners[level + 1]

    @property
    def num_entries(self) -> int:
        """Entries of all levels."""
        return self.start(self.num_levels)

    @property
    def tile_gathered(self) -> int:
        """Gathered entries of one tile: every candidate of every level."""
        return sum(self.candidates(level) for level in range(self.num_levels))

    @property
    def num_gathered(self) -> int:
        """S, the length of the gathered sequence."""
        return self.num_tiles * self.tile_gathered

    @property
    def compresses(self) -> bool:
        """Whether the gathered sequence is shorter than the tokens; if not, dense attention is cheaper."""
        return self.num_gathered < self.num_tokens


def ceil_div(numerator: int, denominator: int) -> int:
    """The quotient of two positive integers, rounded up."""
    return (numerator + denominator - 1) // denominator


def _pyramid(num_levels: int, pooling_factor: int, top_k: int, num_tokens: int, num_tiles: int) -> PyramidShape:
    if num_tokens < 1:
        raise ValueError(f"the sequence must have at least 1 token, got {num_tokens}")
    coarsest_entries = ceil_div(num_tokens, pooling_factor ** (num_levels - 1))
    tile_entries = ceil_div(coarsest_entries, num_tiles)

    # coarsest level first; nobody wins among the tokens
    winners: list[int] = []
    candidates = tile_entries
    for _ in range(num_levels - 1):
        winners.append(min(top_k // num_tiles, candidates))
        candidates = pooling_factor * winners[-1]
    winners.append(0)

    shape = PyramidShape(num_tokens, num_levels, pooling_factor, num_tiles, tile_entries, tuple(winners[::-1]))
    if shape.num_entries > MAX_ENTRIES:
        raise ValueError(
            f"a pyramid over {num_tokens} tokens with num_levels={num_levels} and pooling_factor={pooling_factor} has "
            f"{shape.num_entries} entries, at most {MAX_ENTRIES} can be numbered; choose fewer levels"
        )
    return shape
