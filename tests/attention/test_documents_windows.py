"""Windows and chunks inside documents: each document as a sequence of its own, its sinks and chunks included."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from drawn import draw
from packed import documents_of, spans

from lightning_lighthouse import Documents
from lightning_lighthouse.attention.reference import window_reference
from lightning_lighthouse.attention.windows import chunk_attention, window_attention

KINDS = {
    "window": partial(window_attention, window=7),
    "window with sinks": partial(window_attention, window=5, sink_tokens=3),
    "chunk": partial(chunk_attention, window=6),
}


@pytest.mark.parametrize("attend", KINDS.values(), ids=KINDS)
def test_each_document_by_itself(attend):
    documents = documents_of(2, 83, 25)
    q, k, v = (x.requires_grad_() for x in draw(2, 4, 2, 83))
    out = attend(q, k, v, documents=documents)
    for row, here in spans(documents):
        part = [x[row : row + 1, :, here] for x in (q, k, v)]
        assert torch.equal(out[row : row + 1, :, here], attend(*part))
        torch.testing.assert_close(
            torch.autograd.grad(out[row, :, here].sum(), (q, k, v), retain_graph=True)[1][row, :, here],
            torch.autograd.grad(attend(*part).sum(), part)[1][0],
        )


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
