"""Lighthouse Attention that stays inside documents (docs/understand/documents.md): each as a sequence of its own.

A document has the tiles of the whole sequence, so that no token learns where its document will end. On the reference
this is a loop over documents with the stages as they are, and it is the specification.
"""

from __future__ import annotations

from itertools import chain

import numpy as np
import torch
from torch import Tensor

from lightning_lighthouse.attention import reference
from lightning_lighthouse.attention.backends import choose_stages
from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.attention.document_tables import make_tables
from lightning_lighthouse.attention.documents import Documents
from lightning_lighthouse.attention.documents_loop import each_document
from lightning_lighthouse.attention.documents_sdpa import documents_sdpa
from lightning_lighthouse.attention.pyramid import PyramidShape
from lightning_lighthouse.attention.sdpa import causal_sdpa
from lightning_lighthouse.notices import notice_once


def documents_lighthouse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    config: LighthouseConfig,
    shape: PyramidShape,
    *,
    scale: float | None,
    step: Tensor | None,
    first_head: int,
) -> Tensor:
    """As `lighthouse_attention`, inside documents, with the `shape` of a whole sequence."""
    documents.check_covers(q)
    if config.scorer == "dilated" and config.reads_scores:
        raise ValueError('scorer=\'dilated\' does not know documents yet; use "norm", or selection="strided"')
    if not shape.compresses:
        return documents_sdpa(q, k, v, documents, scale=scale, backend=config.sdpa)
    return _documents_eager(q, k, v, documents, config, shape, scale, step, first_head)


# plain Python also inside compiled frames, which would be traced anew for the lengths of each batch
@torch.compiler.disable
def _documents_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    config: LighthouseConfig,
    shape: PyramidShape,
    scale: float | None,
    step: Tensor | None,
    first_head: int,
) -> Tensor:
    if runs_dense(documents, config, shape):
        return documents_sdpa(q, k, v, documents, scale=scale, backend=config.sdpa)
    if choose_stages(config, q.device, q.dtype) is not reference:
        notice_once("documents loop", "documents are attended to one by one in plain PyTorch, which is slow")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(q, k, v, config, shape.of_document(q.shape[2]), scale, step, first_head)

    return each_document(attend, q, k, v, documents)


def runs_dense(documents: Documents, config: LighthouseConfig, shape: PyramidShape) -> bool:
    """Whether a batch is better off dense inside its documents, as with very many of them; then a notice says so, once.

    Nothing but this sees how many documents the batch has.
    """
    most = config.resolve_max_documents(shape.num_tokens)
    if documents.num_documents > most * documents.batch_size:
        notice_once(
            "documents",
            f"{documents.num_documents} documents in a batch exceed max_documents={most} x {documents.batch_size}: it "
            "trains dense; if many batches do, raise max_documents",
        )
        return True
    lengths = np.fromiter(chain.from_iterable(documents.lengths), np.int64)
    rows = int(make_tables(lengths, shape, config.selection).boundaries[-1])
    num_tokens = documents.batch_size * documents.num_tokens
    if rows >= num_tokens:
        notice_once(
            "short documents",
            f"the documents of a batch are too short to gain: of {num_tokens} tokens Lighthouse would gather {rows} "
            "entries; such batches get dense attention inside documents",
        )
    return rows >= num_tokens


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: LighthouseConfig,
    shape: PyramidShape,
    scale: float | None,
    step: Tensor | None,
    first_head: int,
) -> Tensor:
    """One document by itself."""
    with torch.no_grad():
        selection = reference.select_document(reference.score(q, k, v, shape, config), shape, config, step, first_head)
    o = causal_sdpa(*reference.gather(q, k, v, selection, shape), scale=scale, backend=config.sdpa)
    return reference.scatter(o, selection, shape, config)
