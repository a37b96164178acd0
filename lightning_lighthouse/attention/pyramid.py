"""The sizes of one pyramid: tiles, winners per level, the length of the gathered sequence.

Both backends read them from `PyramidShape`, so they cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# Entries are numbered in int32.
MAX_ENTRIES = 2**31 - 1


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

    def of_document(self, num_tokens: int) -> PyramidShape:
        """The sizes for a document of `num_tokens` tokens inside this sequence: the tiles that it needs, of this size.

        Tiles or winners in proportion to its length would tell its tokens where it will end.
        """
        coarsest = ceil_div(num_tokens, self.window(self.num_levels - 1))
        return replace(self, num_tokens=num_tokens, num_tiles=ceil_div(coarsest, self.tile_entries))

    @property
    def num_entries(self) -> int:
        """Entries of all levels."""
        # a geometric sum
        factor = self.pooling_factor
        return self.num_tiles * self.tile_entries * ((factor**self.num_levels - 1) // (factor - 1))

    @property
    def tile_gathered(self) -> int:
        """Gathered entries of one tile: every candidate of every level."""
        return self.tile_entries + self.pooling_factor * sum(self.winners)

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


def power_of_two(number: int) -> int:
    """The lowest power of two that is at least a positive integer."""
    return 1 << (number - 1).bit_length()


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
