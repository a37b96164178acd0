"""Lighthouse Attention that stays inside documents (docs/understand/documents.md): each as a sequence of its own.

A document has the tiles of the whole sequence, so that no token learns where its document will end. On the reference
this is a loop over documents with the stages as they are, which is the specification; the kernels take all documents
of a batch in one launch.
"""

from __future__ import annotations

from functools import lru_cache, partial
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from lightning_lighthouse.attention import reference
from lightning_lighthouse.attention.backends import choose_stages
from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.attention.document_tables import Packing, make_tables
from lightning_lighthouse.attention.documents import Documents, check_covers
from lightning_lighthouse.attention.documents_loop import each_document
from lightning_lighthouse.attention.documents_sdpa import attend_rows, documents_sdpa
from lightning_lighthouse.attention.host_tables import boundaries
from lightning_lighthouse.attention.pyramid import PyramidShape
from lightning_lighthouse.attention.rotation import Rotation
from lightning_lighthouse.attention.sdpa import causal_sdpa
from lightning_lighthouse.notices import notice_once


def documents_lighthouse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    config: LighthouseConfig,
    *,
    scale: float | None,
    step: Tensor | None,
    first_head: int,
    rotation: Rotation | None,
) -> Tensor:
    """As `lighthouse_attention`, inside documents, for sequences that are long enough to be compressed."""
    check_covers(documents, q)
    # plain ints, also where Dynamo traces sizes as symbols: it knows that a range has a plain length
    batch, num_tokens = len(range(documents.batch_size)), len(range(documents.num_tokens))
    shape = config.pyramid(num_tokens)
    if config.scorer == "dilated" and config.reads_scores:
        raise ValueError('scorer=\'dilated\' does not know documents yet; use "norm", or selection="strided"')
    stages = choose_stages(config, q.device, q.dtype)
    if stages is reference:
        return _one_by_one(q, k, v, documents, config, shape, scale, step, first_head, rotation)
    # a compiled frame reads what was settled before it, for it cannot count documents without knowing them
    is_crowded = documents.is_crowded if torch.compiler.is_compiling() else settle_documents(documents, config)
    if is_crowded:
        return documents_sdpa(q, k, v, documents, scale=scale, backend=config.sdpa)
    packing = Packing.of(shape, batch, config.resolve_max_documents(num_tokens), config.selection)
    return _all_at_once(stages, q, k, v, documents.host, packing, config, scale, step, first_head, rotation)


def settle_documents(documents: Documents, config: LighthouseConfig) -> bool:
    """Whether Lighthouse leaves a batch dense inside its documents: they are too many, or too short to gain.

    A notice says so, once. Nothing but this sees how many documents the batch has. To be called before compiled code
    sees a batch, where `config` has `max_documents` or documents may be very short: such code reads the answer.
    """
    documents.is_crowded = _is_crowded(documents, config)
    return documents.is_crowded


@lru_cache(maxsize=8)
def _is_crowded(documents: Documents, config: LighthouseConfig) -> bool:
    shape = config.pyramid(documents.num_tokens)
    if not shape.compresses:
        # dense for another reason, and told so
        return False
    most = config.resolve_max_documents(documents.num_tokens)
    if documents.num_documents > most * documents.batch_size:
        notice_once(
            "documents",
            f"{documents.num_documents} documents in a batch exceed max_documents={most} x {documents.batch_size}: it "
            "trains dense; if many batches do, raise max_documents",
        )
        return True
    rows = int(make_tables(np.diff(boundaries(documents.host)), shape, config.selection).boundaries[-1])
    num_tokens = documents.batch_size * documents.num_tokens
    if rows >= num_tokens:
        notice_once(
            "short documents",
            f"the documents of a batch are too short to gain: of {num_tokens} tokens Lighthouse would gather {rows} "
            "entries; such batches get dense attention inside documents",
        )
    return rows >= num_tokens


# plain Python also inside compiled frames, which would be traced anew for the lengths of each batch
@torch.compiler.disable
def _one_by_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    config: LighthouseConfig,
    shape: PyramidShape,
    scale: float | None,
    step: Tensor | None,
    first_head: int,
    rotation: Rotation | None,
) -> Tensor:
    """By the reference."""
    if settle_documents(documents, config):
        return documents_sdpa(q, k, v, documents, scale=scale, backend=config.sdpa)
    attend = partial(
        _attend_document,
        config=config,
        shape=shape,
        scale=scale,
        step=step,
        first_head=first_head,
        rotation=rotation,
    )
    return each_document(attend, q, k, v, documents)


def _attend_document(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: LighthouseConfig,
    shape: PyramidShape,
    scale: float | None,
    step: Tensor | None,
    first_head: int,
    rotation: Rotation | None,
) -> Tensor:
    own = shape.of_document(q.shape[2])
    with torch.no_grad():
        scores = reference.score(q, k, v, own, config)
        selection = reference.select_document(scores, own, config, step, first_head)
    o = causal_sdpa(*reference.gather(q, k, v, selection, own, rotation), scale=scale, backend=config.sdpa)
    return reference.scatter(o, selection, own, config)


def _all_at_once(
    stages: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    host: Tensor,
    packing: Packing,
    config: LighthouseConfig,
    scale: float | None,
    step: Tensor | None,
    first_head: int,
    rotation: Rotation | None,
) -> Tensor:
    """By the kernels."""
    batch = q.shape[0]
    q, k, v = (_in_a_row(x) for x in (q, k, v))
    # detached, and not under no_grad: a frame that ends here in an error would leave gradients off
    chosen_by = q.detach(), k.detach()
    slots = stages.select_documents_fwd(*chosen_by, host, *packing, config.cover_prefix, config.seed, step, first_head)
    turns = None if rotation is None else rotation.steps(packing.shape.pooling_factor, packing.shape.num_levels - 1, q)
    distance = 0 if rotation is None else rotation.distance
    qs, ks = (stages.gather_documents_fwd(x, slots, host, *packing, turns, distance) for x in (q, k))
    vs = stages.gather_documents_fwd(v, slots, host, *packing, None, 0)
    o = attend_rows(qs, ks, vs, host, scale, config.sdpa, packing)
    out = stages.scatter_documents_fwd(o, slots, host, *packing, config.combine == "mean")
    return out if batch == 1 else out[0].unflatten(1, (batch, -1)).transpose(0, 1)


def _in_a_row(x_BHND: Tensor) -> Tensor:
    """`[1, H, B N, D]`: a view where the memory is that of a model, else a copy."""
    return x_BHND if x_BHND.shape[0] == 1 else x_BHND.transpose(0, 1).flatten(1, 2).unsqueeze(0)
