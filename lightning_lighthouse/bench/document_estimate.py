"""What attention inside documents costs, and Lighthouse can save of it: estimated, before anything trains.

By the times of one layer in docs/numbers/benchmarks.md: bf16, 8 heads of 128, forward and backward, on an H100 or H200
alone, without what the host needs. Attention takes a constant time for each pair of tokens of a long document, more for
those of a short one and some for each of its tokens; gathered rows cost alike. All other stages take a constant time
for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.attention.document_tables import make_tables
from lightning_lighthouse.attention.documents_sdpa import LONG

# cuDNN: 130.3 ms for the square of 98,304 tokens
MS_OF_A_PAIR = 130.3 / 98_304**2
# flash's varlen kernel, to which documents of up to LONG rows go: fitted to the rows `code`, `web-short` and `chat`
MS_OF_A_SHORT_PAIR = 21e-9
MS_OF_A_SHORT_ROW = 24e-6
# 5.35 ms at 98,304 tokens, less attention over 18,432 rows
MS_OF_A_TOKEN = (5.35 - MS_OF_A_PAIR * 18_432**2) / 98_304


class DocumentEstimate(NamedTuple):
    """Means over sequences.

    Args:
        num_sequences: Looked at.
        num_tokens: N, of a sequence.
        documents: Of a sequence.
        most_documents: Of one of them.
        length: Sum of n^2 over the documents of n tokens, by N: what dense attention inside documents costs a token.
        gathered: Rows that Lighthouse gathers, by N; 1 where it runs dense.
        dense_ms: One layer of dense attention inside documents, for a sequence.
        lighthouse_ms: The same with Lighthouse; that of dense attention for sequences that run dense.
        whole_dense_ms: Dense attention over the whole sequence.
        whole_lighthouse_ms: Lighthouse over the whole sequence.
    """

    num_sequences: int
    num_tokens: int
    documents: float
    most_documents: int
    length: float
    gathered: float
    dense_ms: float
    lighthouse_ms: float
    whole_dense_ms: float
    whole_lighthouse_ms: float


def estimate(sequences: Sequence[Sequence[int]], config: LighthouseConfig) -> DocumentEstimate:
    """Estimate from the documents of some sequences.

    Args:
        sequences: For each the tokens of its documents, N together.
        config: Of Lighthouse Attention.
    """
    num_tokens = sum(sequences[0])
    each = [_costs(np.asarray(lengths, np.int64), config) for lengths in sequences]
    length, gathered, dense_ms, lighthouse_ms = np.mean(each, axis=0).tolist()
    _, _, whole_dense_ms, whole_lighthouse_ms = _costs(np.array([num_tokens]), config)
    counts = [len(lengths) for lengths in sequences]
    return DocumentEstimate(
        num_sequences=len(sequences),
        num_tokens=num_tokens,
        documents=sum(counts) / len(counts),
        most_documents=max(counts),
        length=length,
        gathered=gathered,
        dense_ms=dense_ms,
        lighthouse_ms=lighthouse_ms,
        whole_dense_ms=whole_dense_ms,
        whole_lighthouse_ms=whole_lighthouse_ms,
    )


def _costs(lengths: np.ndarray, config: LighthouseConfig) -> tuple[float, float, float, float]:
    """Of one sequence: its length, rows by tokens, and the ms of dense attention and of Lighthouse."""
    num_tokens = int(lengths.sum())
    pairs = float((lengths.astype(float) ** 2).sum())
    dense_ms = _attention_ms(lengths)
    dense = (pairs / num_tokens, 1.0, dense_ms, dense_ms)
    shape = config.pyramid(num_tokens)
    if not shape.compresses or len(lengths) > config.resolve_max_documents(num_tokens):
        return dense
    rows = np.diff(make_tables(lengths, shape, config.selection).boundaries)
    if rows.sum() >= num_tokens:
        return dense
    lighthouse_ms = _attention_ms(rows) + num_tokens * MS_OF_A_TOKEN
    return pairs / num_tokens, float(rows.sum()) / num_tokens, dense_ms, lighthouse_ms


def _attention_ms(lengths: np.ndarray) -> float:
    """Of dense attention inside documents of so many rows."""
    rows = lengths.astype(float)
    long, short = rows[rows > LONG], rows[rows <= LONG]
    short_ms = (short**2).sum() * MS_OF_A_SHORT_PAIR + short.sum() * MS_OF_A_SHORT_ROW
    return float((long**2).sum() * MS_OF_A_PAIR + short_ms)


def describe(found: DocumentEstimate, *, are_kept: bool) -> list[str]:
    """The estimate in lines.

    Args:
        found: From `estimate`.
        are_kept: Whether the training keeps attention inside documents.
    """
    lines = [
        f"documents: {found.documents:,.1f} a sequence, {found.most_documents:,} at most, in {found.num_sequences:,} "
        f"sequences; attention inside them is as long as {found.length:,.0f} of {found.num_tokens:,} tokens "
        f"(sum n^2 / N), and Lighthouse gathers {found.gathered:.3f} N",
        "estimated for one layer of 8 heads of 128 on an H100 or H200, forward + backward of a sequence: "
        f"{_compared(found.dense_ms, found.lighthouse_ms)} inside documents, "
        f"{_compared(found.whole_dense_ms, found.whole_lighthouse_ms)} across them",
    ]
    if are_kept and found.lighthouse_ms >= found.dense_ms:
        lines.append(
            "Lighthouse gains nothing on documents as short as these: dense attention inside them is as fast "
            "(lighthouse.enabled=false), or longer documents pay (docs/use/documents.md)"
        )
    if not are_kept and found.most_documents > 1:
        lines.append("attention goes across documents, as lighthouse.documents is not true")
    return lines


def _compared(dense_ms: float, lighthouse_ms: float) -> str:
    return f"dense {dense_ms:.3g} ms, Lighthouse {lighthouse_ms:.3g} ms ({dense_ms / lighthouse_ms:.1f} times)"
