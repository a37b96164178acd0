"""Windows and chunks inside documents: each document as a sequence of its own, its sinks and chunks included."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from drawn import draw
from packed import documents_of, spans

from lightning_lighthouse import Documents
from lightning_lighthouse.attention.documents_windows import windows_inside
from lightning_lighthouse.attention.reference import window_reference
from lightning_lighthouse.attention.windows import chunk_attention, window_attention

KINDS = {
    "window": partial(window_attention, window=7),
    "window with sinks": partial(window_attention, window=5, sink_tokens=3),
    "chunk": partial(chunk_attention, window=6),
}
# tokens up to which documents are attended to together; chunks are all
SPANNED = dict(zip(KINDS.values(), (7, 8, 83), strict=True))


@pytest.mark.parametrize("attend", KINDS.values(), ids=KINDS)
def test_each_document_by_itself(attend):
    documents = documents_of(2, 83, 25)
    q, k, v = (x.requires_grad_() for x in draw(2, 4, 2, 83))
    out = attend(q, k, v, documents=documents)
    for row, here in spans(documents):
        part = [x[row : row + 1, :, here] for x in (q, k, v)]
        found, expected = out[row : row + 1, :, here], attend(*part)
        if part[0].shape[2] > SPANNED[attend]:
            assert torch.equal(found, expected)
        else:
            # beside others, so with other roundings
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
        torch.testing.assert_close(
            torch.autograd.grad(out[row, :, here].sum(), (q, k, v), retain_graph=True)[1][row, :, here],
            torch.autograd.grad(attend(*part).sum(), part)[1][0],
        )


LENGTHS = {
    "short and long in turn": [[3, 9, 4, 1, 12, 8], [8, 8, 8, 13]],
    "short alone": [[3, 8, 1, 8, 8, 8, 1], [8, 8, 8, 8, 5]],
    "long alone": [[9, 28], [20, 17]],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_only_documents_longer_than_their_window_are_a_call_each(lengths):
    documents = Documents(lengths)
    window, sinks = 6, 2
    q, k, v = (x.requires_grad_() for x in draw(2, 4, 2, 37))
    calls = []

    def attend(*part):
        calls.append(part[0].shape[2])
        return window_attention(*part, window, sink_tokens=sinks)

    out = windows_inside(attend, q, k, v, documents, window + sinks, scale=None, sdpa="auto")
    assert calls == [length for row in documents.lengths for length in row if length > window + sinks]
    expected = torch.cat(
        [
            torch.cat(
                [
                    window_reference(*(x[row : row + 1, :, here] for x in (q, k, v)), window, sink_tokens=sinks)
                    for place, here in spans(documents)
                    if place == row
                ],
                2,
            )
            for row in range(2)
        ]
    )
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    for found, wanted in zip(
        torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(expected, (q, k, v), dout), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_sinks_are_those_of_the_document():
    q, k, v = draw(1, 2, 1, 40)
    out = window_attention(q, k, v, 4, sink_tokens=2, documents=Documents([[15, 25]]))
    expected = window_reference(*(x[:, :, 15:] for x in (q, k, v)), 4, sink_tokens=2)
    torch.testing.assert_close(out[:, :, 15:], expected)


@pytest.mark.parametrize("attend", KINDS.values(), ids=KINDS)
def test_nothing_passes_between_documents(attend):
    q, k, v = draw(1, 2, 1, 40)
    documents = Documents([[11, 17, 12]])
    out = attend(q, k, v, documents=documents)
    for x in (q, k, v):
        x[:, :, :11] = x[:, :, 28:] = torch.nan
    assert torch.equal(attend(q, k, v, documents=documents)[:, :, 11:28], out[:, :, 11:28])


@pytest.mark.parametrize("attend", KINDS.values(), ids=KINDS)
def test_documents_of_another_batch_are_refused(attend):
    with pytest.raises(ValueError, match="documents cover 1 x 30 tokens, q has 1 x 40"):
        attend(*draw(1, 2, 1, 40), documents=Documents([[30]]))
