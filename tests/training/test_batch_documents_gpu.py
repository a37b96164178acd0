"""On a GPU: who waits for whom, where documents are set or looked for, and compiled frames."""

from __future__ import annotations

import pytest
import torch
from all_lighthouse import all_lighthouse
from documents_run import decoder
from fitting import trainer
from torch.utils.data import DataLoader, IterableDataset

from lightning_lighthouse import Documents, LighthouseConfig
from lightning_lighthouse.routing.packing import PackedBatchError, PackingCheck

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

TOKENS = 4096
CONFIG = LighthouseConfig(num_levels=3, pooling_factor=4, top_k=64)


class Batches(IterableDataset):
    """Tokens in host memory, in documents that differ from batch to batch."""

    def __init__(self, form):
        self.form = form

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for step in range(8):
            lengths = [1000 + 100 * step, 1, TOKENS - 1000 - 100 * step]
            documents = Documents([lengths])
            value = documents if self.form == "documents" else documents.document_ids("cpu")
            yield {"tokens": torch.randint(31, (1, TOKENS + 1), generator=generator), self.form: value}


@pytest.mark.parametrize("form", ["documents", "document_ids"])
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_no_forward_or_backward_waits_for_documents(tmp_path, form, compile):
    """The first batches compile, choose kernels and are audited; those behind them must not wait."""

    class Watched(type(decoder())):
        def training_step(self, batch, batch_idx):
            torch.cuda.set_sync_debug_mode("error" if batch_idx > 5 else "default")
            return super().loss(batch)

        def on_after_backward(self):
            torch.cuda.set_sync_debug_mode("default")

    model = decoder(Watched, compile=compile).float()
    callback = all_lighthouse(8, CONFIG, documents=True)
    run = trainer(tmp_path, [callback], accelerator="gpu", devices=1, max_steps=8, precision="bf16-mixed")
    try:
        run.fit(model, DataLoader(Batches(form), batch_size=None, pin_memory=True))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.global_step == 8


def packed(is_packed):
    return {"document_ids": (torch.arange(TOKENS, device="cuda") > (9 if is_packed else TOKENS)).long()[None]}


def test_the_first_verdict_is_waited_for_and_later_ones_are_not():
    check = PackingCheck()
    with pytest.raises(PackedBatchError):
        check.look(packed(True))
    check = PackingCheck()
    check.look(packed(False))
    late = packed(True)
    # the GPU is busy: whoever waited for it would be told now
    x = torch.randn(8192, 8192, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            x = x @ x * 1e-3
        check.look(late)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    with pytest.raises(PackedBatchError):
        check.look(packed(False))


def test_the_last_verdict_is_told_at_the_end():
    check = PackingCheck()
    check.look(packed(False))
    check.look(packed(True))
    with pytest.raises(PackedBatchError):
        check.finish()
