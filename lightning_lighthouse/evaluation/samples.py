"""The text of an evaluation: the same tokens each time, from the validation data; and phrases in the model's tokens."""

# N tokens, C candidates

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.evaluation.text import read_text

# its multiples, modulo 1, lie far from one another however many they are
GOLDEN = 0.6180339887498949
# how far apart the samples of two seeds begin
SILVER = 0.41421356237309503
DIGITS = "0123456789"


# a recipe may name one by its class
@runtime_checkable
class Tokenizer(Protocol):
    """What phrases need of a tokenizer: that of the data has it."""

    def encode(self, text: bytes) -> Any:
        """Ids of one document, with one end-of-document id behind them."""


@dataclass(frozen=True)
class Haystack:
    """Validation text, sequence behind sequence.

    Workers that read in turn, or a loader that shuffles, hand out sequences that do not continue one another: a sample
    across two of them would have text before it that says nothing of what comes.

    Args:
        tokens: `[N]` token ids, on the CPU.
        seed: Other samples for another one.
        sequence: Tokens of each sequence; None: all of it is one.
    """

    tokens: Tensor
    seed: int = 0
    sequence: int | None = None

    def draw(self, num_tokens: int, index: int) -> Tensor:
        """The `index`-th sample of so many tokens, always the same; samples overlap only where the text is short.

        One of each sequence, then others of them, as long as a sequence has room for one more; what is longer than a
        sequence, or the sample behind those, lies anywhere.

        Raises:
            ValueError: The text is shorter.
        """
        if num_tokens > len(self.tokens):
            raise ValueError(f"{num_tokens:,} tokens of text are needed, there are {len(self.tokens):,}")
        sequence, count = self._sequences
        if index < count * (sequence // num_tokens):
            first, room = (index + self.seed) % count * sequence, sequence - num_tokens
            index //= count
        else:
            first, room = 0, len(self.tokens) - num_tokens
        start = first + round((index * GOLDEN + self.seed * SILVER) % 1.0 * room)
        return self.tokens[start : start + num_tokens]

    def shortage(self, num_tokens: int, num_samples: int) -> str:
        """What to tell where so many samples of so many tokens are not apart; "" where they are."""
        sequence, count = self._sequences
        # longer ones lie across sequences
        room = count * (sequence // num_tokens) or len(self.tokens) // num_tokens
        if num_samples <= room:
            return ""
        return (
            f"the validation text holds {room} of {num_samples} samples of {num_tokens:,} tokens: the others overlap "
            "them, and standard errors are too small; validate on more batches"
        )

    @property
    def _sequences(self) -> tuple[int, int]:
        """Tokens of each, and how many are whole."""
        sequence = self.sequence or len(self.tokens)
        return sequence, len(self.tokens) // sequence


def enough(longest: int, num_samples: int) -> int:
    """Tokens of text for so many samples that hardly overlap; up to ten samples it is the same text.

    Args:
        longest: Tokens of a sample.
        num_samples: Of each place.
    """
    return 2 * max(10, num_samples) * (longest + 1)


class Collector:
    """Keeps the text of validation batches, in their order.

    Args:
        num_samples: Of each place.
        longest: Tokens of a sample; None: those of a sequence.
    """

    def __init__(self, num_samples: int, longest: int | None) -> None:
        self._num_samples, self._longest = num_samples, longest
        self.num_tokens = 0
        # of a sequence, as the model is trained on it
        self.seq_len = 0
        self._parts: list[Tensor] = []
        # tokens of the sequences that are kept, one behind the last included
        self._widths: set[int] = set()

    @property
    def _limit(self) -> int:
        return enough(self._longest or self.seq_len, self._num_samples)

    def add(self, batch: Any) -> None:
        """Keep a batch, unless there is enough.

        Raises:
            TypeError: It holds no token ids.
            ValueError: It is padded or masked.
        """
        if self._parts and self.num_tokens >= self._limit:
            return
        text = read_text(batch, asker="LongContextEvaluation")
        # the first sequence says how long they are
        self.seq_len = self.seq_len or text.inputs.shape[1]
        is_whole = text.num_targets == text.inputs.shape[1]
        rows = torch.cat([text.inputs, text.targets[:, -1:]], dim=1) if is_whole else text.inputs
        self._parts.append(rows.flatten().cpu())
        self._widths.add(rows.shape[1])
        self.num_tokens += rows.numel()

    def haystack(self, seed: int = 0) -> Haystack | None:
        """All of it in one piece; None where there is none."""
        if not self._parts:
            return None
        # where lengths differ no place is known to be the begin of a sequence
        sequence = min(self._widths) if len(self._widths) == 1 else None
        return Haystack(torch.cat(self._parts)[: self._limit], seed, sequence)


def seeded(seed: int, *place: object) -> torch.Generator:
    """A generator on the CPU that draws the same at the same place each time, in every process."""
    # not hash(): Python's differs from one process to the next
    return torch.Generator().manual_seed(zlib.crc32(repr((seed, *place)).encode()))


class Phrases:
    """Sentences as the model reads them.

    Args:
        tokenizer: That of the data.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.encode = lru_cache(maxsize=None)(self._encode)

    def _encode(self, text: str) -> Tensor:
        """Token ids `[N]` of a text, without an end of document."""
        return torch.as_tensor([int(token) for token in self._tokenizer.encode(text.encode())][:-1])

    def question(self, prompt: str, answers: Sequence[str] = DIGITS) -> tuple[Tensor, Tensor]:
        """A prompt as the model reads it before one of several answers, and the token that each answer begins with.

        How a tokenizer cuts " 7" is its own business: what all prompts with their answers begin with is the prompt.

        Returns:
            `[N]` token ids, and `[C]`, in the order of the answers.

        Raises:
            SettingError: The tokenizer does not tell the answers apart by one token.
        """
        whole = [self.encode(f"{prompt} {answer}").tolist() for answer in answers]
        same = 0
        while all(len(ids) > same + 1 for ids in whole) and len({ids[same] for ids in whole}) == 1:
            same += 1
        candidates = [ids[same] if len(ids) > same else -1 for ids in whole]
        if len(set(candidates)) < len(candidates) or -1 in candidates or same == 0:
            raise SettingError(
                "LongContextEvaluation asks for digits, which must differ in their first token: the tokenizer writes "
                f"{' '.join(answers)} as {candidates}; set passkey and lookups to false"
            )
        return torch.tensor(whole[0][:same]), torch.tensor(candidates)
