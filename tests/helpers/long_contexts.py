"""Models whose long context is known by construction, and what the tests of the evaluation share."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lighthouse.data.tokenizers import ByteTokenizer
from lightning_lighthouse.evaluation.measures import Material
from lightning_lighthouse.evaluation.measuring import Asked, measure
from lightning_lighthouse.evaluation.samples import Haystack, Phrases
from lightning_lighthouse.evaluation.scoring import Scorer

BYTES = 257
# sharp enough that no other key gets a share
SHARP = 200.0


class Induction(nn.Module):
    """An induction network, made by hand: what stood behind this token the last time? Two layers of attention.

    The first layer looks at the token before, by codes of the positions. The second one looks for where the token of
    now was the one before, by codes of the tokens, and its value is the token there.

    Args:
        vocab_size: Tokens.
        longest: Positions.
        window: Keys that the second layer sees, itself included; None: all.
    """

    def __init__(self, vocab_size: int, longest: int, window: int | None = None, width: int = 128) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def codes(count: int) -> Tensor:
            signs = torch.randint(2, (count, width), generator=generator) * 2 - 1
            return signs.double() / width**0.5

        self.register_buffer("positions", codes(longest + 1))
        self.register_buffer("tokens", codes(vocab_size))
        self.head = nn.Linear(width, vocab_size, bias=False, dtype=torch.float64)
        self.head.weight.data = SHARP * self.tokens
        self.window = window

    def forward(self, inputs: Tensor) -> Tensor:
        x_BNW, places_NW = self.tokens[inputs], self.positions[: inputs.shape[1] + 1]
        before_BNW = self._attend(places_NW[:-1], places_NW[1:], x_BNW)
        mask = None
        if self.window is not None:
            rows = torch.arange(inputs.shape[1])
            away = rows[:, None] - rows
            mask = (away >= 0) & (away < self.window)
        return self.head(self._attend(x_BNW, before_BNW, x_BNW, mask))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (x.expand(len(v), -1, -1)[:, None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=SHARP)[:, 0]


class Reader(nn.Module):
    """Reads bytes as a person does, and answers with the digit that a sentence gave.

    Args:
        reach: The last bytes that it remembers; None: all.
        pattern: What the sentence looks like, with the digit in parentheses, for the word that was asked for.
    """

    def __init__(self, reach: int | None = None, pattern: str = r"pass key is (\d)") -> None:
        super().__init__()
        self.reach, self.pattern = reach, pattern
        self.seen: list[str] = []

    def forward(self, inputs: Tensor) -> Tensor:
        logits = torch.zeros(*inputs.shape, BYTES)
        for row, ids in enumerate(inputs.tolist()):
            text = bytes(token for token in ids if token < 256).decode(errors="replace")
            if len(text) > 4:
                self.seen.append(text)
            asked = text.rpartition(" the ")[2].removesuffix(" is ")
            found = re.search(self.pattern.format(key=asked), text[-self.reach :] if self.reach else text)
            if found:
                logits[row, -1, ord(found[1])] = 9.0
        return logits


def text_of(num_tokens: int, seed: int = 0) -> Tensor:
    """Bytes of words, none of which is a phrase of the evaluation."""
    generator = torch.Generator().manual_seed(seed)
    words = ["meadow", "river", "stone", "and", "under", "slowly", "a", "wind", "went", "over"]
    drawn = torch.randint(len(words), (num_tokens // 2,), generator=generator).tolist()
    return torch.tensor(list(" ".join(words[i] for i in drawn).encode())[:num_tokens])


def found(
    model: nn.Module, measures: list[str], lengths: list[int], num_samples: int = 10, text: Tensor | None = None
) -> dict[str, list[dict]]:
    """The rows of one model over bytes."""
    text = text_of(4 * max(lengths)) if text is None else text
    phrases = Phrases(ByteTokenizer())
    material = Material(Haystack(text), phrases, seed=0)
    with torch.no_grad():
        return measure(Scorer(model), material, Asked(measures, lengths).units(phrases), num_samples)


class Books(LightningDataModule):
    """Byte text for trainings, without files."""

    seq_len = 256

    def __init__(self, train: object = None, count: int = 12, batch_size: int = 1) -> None:
        super().__init__()
        self.train, self.count, self.batch_size = train, count, batch_size

    def load_tokenizer(self) -> ByteTokenizer:
        return ByteTokenizer()

    def _loader(self, seed: int) -> DataLoader:
        tokens = text_of(self.count * (self.seq_len + 1), seed)
        return DataLoader(tokens.view(self.count, -1), batch_size=self.batch_size)

    def train_dataloader(self) -> object:
        return self._loader(1) if self.train is None else self.train

    def val_dataloader(self) -> DataLoader:
        return self._loader(2)
