"""How much a model reads of its future: its loss on a true token, with and without the text that follows it.

Plain PyTorch. `token_losses` and `read_text` are what a model and a batch must offer; `draw_positions` and `draw_trial`
make two versions of a batch, and `Trial.differences` compares the losses on both.
"""

# B batch, N tokens, V vocabulary, P parts of a sequence with a tested position each, R trials

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lighthouse.evaluation.text import Text

# A part of a sequence in which one position is tested, in windows of the coarsest level: long enough for clean text
# before the position, short enough for many positions
PART_WINDOWS = 16


@dataclass(frozen=True)
class Trial:
    """Two versions of a batch that differ in the text after the tested positions.

    At each position one version, by a toss, goes on with the true text and the other with the text of another
    sequence, up to the end of the position's part of the sequence. Everything else about the two is drawn alike, so
    that the losses on the true next token differ by the leak, and by chance.

    Args:
        versions: Two times `[B, N]` token ids.
        positions: `[B, P]`, the last token before the text may differ.
        is_replaced: `[B, P]` bool, whether the first version is the one that goes on with other text.
    """

    versions: tuple[Tensor, Tensor]
    positions: Tensor
    is_replaced: Tensor

    def differences(self, first: Tensor, second: Tensor) -> Tensor:
        """Loss with the future replaced minus loss with the true one, `[B, P]`, from the `[B, N]` of both versions."""
        difference = first.gather(1, self.positions) - second.gather(1, self.positions)
        return torch.where(self.is_replaced, difference, -difference)


def draw_positions(text: Text, window: int, generator: torch.Generator, many: bool = True) -> tuple[Tensor, int]:
    """Draw positions inside windows, each at most once.

    A sequence is cut into parts of `PART_WINDOWS` windows, and a position is in the last quarter of its part. The text
    after it is replaced to the end of the part, at least a window, so that three quarters of the next part are true
    before the next position. A sequence of a single part is tested anywhere, and replaced to its end.

    Args:
        text: The true text.
        window: Tokens of a window of the coarsest level.
        generator: On the CPU.
        many: False: the whole sequence is one part.

    Returns:
        `[R, B, P]`, positions for R trials in the P parts, and the tokens of a part.
    """
    batch, num_tokens = text.inputs.shape
    parts = max(1, num_tokens // (PART_WINDOWS * window)) if many else 1
    if parts == 1:
        part, low, high = num_tokens, 0, text.num_targets - 1
    else:
        part = num_tokens // parts // window * window
        low, high = part - part // 4, part - window
    inside = torch.arange(low, max(high, low + 1))
    # the token after the last one of a window is in none that the position is in
    inside = inside[(inside + 1) % window > 0] if (inside + 1).remainder(window).any() else inside
    order = torch.rand(len(inside), batch, parts, generator=generator).argsort(dim=0)
    return (inside[order] + torch.arange(parts) * part).to(text.inputs.device), part


def draw_trial(text: Text, other: Tensor, positions: Tensor, part: int, generator: torch.Generator) -> Trial:
    """Toss at each position which version has the future replaced.

    Args:
        text: The true text.
        other: `[B, N]`, other text.
        positions: `[B, P]`, one in each part.
        part: Tokens of a part.
        generator: On the CPU.
    """
    parts, device = positions.shape[1], positions.device
    is_replaced = torch.randint(2, positions.shape, generator=generator).bool().to(device)
    after = torch.arange(parts * part, device=device).view(parts, part) > positions[..., None]
    # what is left of a sequence after its last part stays true
    rest = text.inputs.shape[1] - parts * part
    swaps = [F.pad((after & chosen[..., None]).flatten(1), (0, rest)) for chosen in (is_replaced, ~is_replaced)]
    first, second = (torch.where(swap, other, text.inputs) for swap in swaps)
    return Trial((first, second), positions, is_replaced)


def other_text(texts: list[Text], index: int, shift: int) -> Tensor:
    """For each sequence of `texts[index]` another sequence of `texts` of at least its length, cut to it.

    Args:
        texts: All there are.
        index: The batch that needs other text.
        shift: Which of the other sequences: the `shift`-th after its own, counted round.

    Returns:
        `[B, N]`. Where no other sequence is long enough, the sequence itself, turned by half its length.
    """
    inputs = texts[index].inputs
    batch, num_tokens = inputs.shape
    long_enough = [text.inputs for text in texts if text.inputs.shape[1] >= num_tokens]
    pool = torch.cat([rows[:, :num_tokens] for rows in long_enough])
    if len(pool) == 1:
        return inputs.roll(num_tokens // 2, dims=1)
    before = sum(len(text.inputs) for text in texts[:index] if text.inputs.shape[1] >= num_tokens)
    own = torch.arange(before, before + batch, device=inputs.device)
    return pool[(own + 1 + shift % (len(pool) - 1)) % len(pool)]


@dataclass
class Sample:
    """Running sums of the differences, from which their mean and its standard error follow."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, count: float, total: float, squares: float) -> None:
        """Add some differences: how many, their sum and the sum of their squares."""
        self.count += round(count)
        self.total += total
        self.squares += squares

    @property
    def mean(self) -> float:
        """NaN without samples."""
        return self.total / self.count if self.count else math.nan

    @property
    def stderr(self) -> float:
        """Standard error of the mean; NaN with fewer than two samples."""
        if self.count < 2:
            return math.nan
        # rounding can leave a small negative number
        variance = max(0.0, self.squares - self.total * self.total / self.count) / (self.count - 1)
        return math.sqrt(variance / self.count) if math.isfinite(self.total) else math.nan
