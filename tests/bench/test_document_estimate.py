"""The estimate of what attention inside documents costs: the measured rows, and the arithmetic of its definition."""

from __future__ import annotations

import csv

import pytest
from places import DOCS, ROOT

from lightning_lighthouse import LighthouseConfig
from lightning_lighthouse.bench.document_estimate import describe, estimate
from lightning_lighthouse.bench.document_kinds import DESCRIPTIONS, KINDS, draw_sequences
from lightning_lighthouse.bench.documents import BATCHES

PAPER = LighthouseConfig(top_k=1536)


# docs/numbers/benchmarks.md, "One layer"
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "dense_ms", "lighthouse_ms"),
    [
        (32_768, 1024, 14.3, 1.963),
        (65_536, 1024, 56.7, 2.757),
        (98_304, 1536, 130.3, 5.350),
        (131_072, 1024, 233.5, 4.545),
    ],
)
def test_one_document_costs_what_was_measured(num_tokens, top_k, dense_ms, lighthouse_ms):
    found = estimate([[num_tokens]], LighthouseConfig(top_k=top_k, selection="published"))
    assert found.dense_ms == pytest.approx(dense_ms, rel=0.05)
    assert found.lighthouse_ms == pytest.approx(lighthouse_ms, rel=0.2)
    assert (found.whole_dense_ms, found.whole_lighthouse_ms) == (found.dense_ms, found.lighthouse_ms)
    assert (found.length, found.documents, found.most_documents) == (num_tokens, 1, 1)


def test_the_length_is_that_of_the_documents_and_means_are_over_sequences():
    found = estimate([[300, 700], [1000]], LighthouseConfig(2, 2, 8))
    assert found.length == ((300**2 + 700**2) / 1000 + 1000) / 2
    assert (found.documents, found.most_documents, found.num_sequences, found.num_tokens) == (1.5, 2, 2, 1000)


def test_dense_attention_inside_documents_is_cheap_and_lighthouse_gains_less():
    whole, halves, short = (estimate([[98_304 // n] * n], PAPER) for n in (1, 2, 128))
    assert halves.dense_ms == pytest.approx(whole.dense_ms / 2)
    gains = [found.dense_ms / found.lighthouse_ms for found in (whole, halves, short)]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > 20
    assert 0 < short.gathered < 0.3


@pytest.mark.parametrize("lengths", [[256] * 385 + [98_304 - 256 * 385 + 0], [98_304 // 1024] * 1024])
def test_more_documents_than_memory_is_kept_for_are_dense(lengths):
    lengths = [n for n in lengths if n > 0]
    lengths[-1] += 98_304 - sum(lengths)
    found = estimate([lengths], PAPER)
    assert found.gathered == 1
    assert found.lighthouse_ms == found.dense_ms
    assert describe(found, are_kept=True)[-1].startswith("Lighthouse gains nothing on documents as short as these")


def test_the_lines_say_that_it_is_estimated_and_whether_documents_are_kept():
    found = estimate([[40_000, 58_304]], PAPER)
    length, times = describe(found, are_kept=True)
    assert "2.0 a sequence, 2 at most" in length
    assert "as long as 50,856 of 98,304 tokens (sum n^2 / N)" in length
    assert times.startswith("estimated for one layer of 8 heads of 128 on an H100 or H200")
    assert describe(found, are_kept=False)[-1] == "attention goes across documents, as lighthouse.documents is not true"
    assert len(describe(estimate([[98_304]], PAPER), are_kept=False)) == 2


def test_the_page_has_the_rows_that_are_estimated():
    page = (DOCS / "use" / "documents.md").read_text()
    for count in (1, 2, 8, 24, 96, 384):
        tokens = 98_304 // count
        found = estimate([[tokens] * count], PAPER)
        row = (
            f"| {count} of {tokens:,} tokens | {found.length:,.0f} | {found.dense_ms:.3g} | {found.lighthouse_ms:.3g} |"
        )
        assert row in page


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_has_the_documents_that_are_drawn(kind):
    sequences = draw_sequences(kind, 98_304, 200)
    # also of more documents than memory is kept for by default
    each = [estimate([lengths], LighthouseConfig(max_documents=1024)) for lengths in sequences]
    documents, length, gathered = (
        sum(getattr(found, name) for found in each) / 200 for name in ("documents", "length", "gathered")
    )
    most_documents, most_gathered = (max(getattr(found, name) for found in each) for name in ("documents", "gathered"))
    row = (
        f"| `{kind}` | {DESCRIPTIONS[kind]} | {documents:.0f}, {most_documents:.0f} | {length:,.0f} | "
        f"{gathered:.3f}, {most_gathered:.3f} |"
    )
    assert row in (DOCS / "understand" / "documents.md").read_text(), row


with (ROOT / "experiments" / "benchmarks" / "documents.csv").open(newline="") as stream:
    MEASURED = {row["kind"]: row for row in csv.DictReader(stream)}


@pytest.mark.parametrize("kind", MEASURED)
def test_the_estimate_is_near_what_a_gpu_alone_took(kind):
    row = MEASURED[kind]
    # as the bench draws them
    sequences = list(dict.fromkeys(draw_sequences(kind, 98_304, BATCHES)))
    assert len(sequences) == int(row["batches"])
    found = estimate(sequences, PAPER)
    # of six digits
    assert found.documents == pytest.approx(float(row["documents"]), rel=1e-5)
    assert found.dense_ms == pytest.approx(float(row["masked_device_ms"]), rel=0.12)
    if row["lighthouse_device_ms"]:
        assert found.lighthouse_ms == pytest.approx(float(row["lighthouse_device_ms"]), rel=0.25)


def test_lighthouse_gains_on_the_gpu_alone_as_far_as_documents_are_kept():
    gains = []
    for count in (1, 8, 96, 384):
        found = estimate([[98_304 // count] * count], PAPER)
        gains.append(found.dense_ms / found.lighthouse_ms)
    assert gains == sorted(gains, reverse=True)
    assert gains[-1] > 2
