"""A pretrained model on packed sequences: attention stays inside documents, and positions restart where asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from all_lighthouse import all_lighthouse
from pretrained import VOCABULARY, load_model, save_model
from torch.utils.data import DataLoader

from lightning_lighthouse import Documents, LighthouseConfig, patch_attention
from lightning_lighthouse.routing.packing import PackedBatchError
from lightning_lighthouse.routing.reasons import CrossingError

pytest.importorskip("transformers", reason="needs the extra hf")

from lightning_lighthouse.huggingface import HuggingFaceDecoder

CONFIG = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=8)
LENGTHS = [41, 1, 55]
TOKENS = sum(LENGTHS)
# one target more than there are tokens
WHOLE = Documents([[*LENGTHS[:-1], LENGTHS[-1] + 1]])


def batch(*names: str) -> dict[str, Any]:
    tokens = torch.randint(VOCABULARY, (1, TOKENS + 1), generator=torch.Generator().manual_seed(1))
    forms = {
        "documents": WHOLE,
        "document_ids": WHOLE.document_ids("cpu"),
        "position_ids": WHOLE.position_ids("cpu"),
        "positions": WHOLE.position_ids("cpu"),
    }
    return {"tokens": tokens, **{name: forms[name] for name in names}}


def made(tmp_path: Path, family: str = "Llama", sizes: dict | None = None, **settings: Any) -> HuggingFaceDecoder:
    module = HuggingFaceDecoder(save_model(tmp_path / "model", family, **(sizes or {})), loss_chunk=17, **settings)
    module.configure_model()
    return module


def one_by_one(module: HuggingFaceDecoder) -> list[torch.Tensor]:
    """Loss and gradients of transformers' own forward over each document by itself."""
    model = load_model(module.hparams["model"]).double().train()
    tokens = batch()["tokens"]
    logits = [model(input_ids=part, use_cache=False).logits for part in tokens[:, :-1].split(LENGTHS, 1)]
    loss = F.cross_entropy(torch.cat(logits, 1)[0], tokens[0, 1:])
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


FAMILIES = {
    "Llama": ("Llama", {}),
    "GPT-2": ("GPT-2", {}),
    "windows as long as the sequence": ("Gemma 3", {"sliding_window": 512}),
    "windows in all layers": ("Mistral", {"sliding_window": 512}),
}


@pytest.mark.parametrize(("family", "sizes"), FAMILIES.values(), ids=FAMILIES)
def test_a_dense_step_equals_the_documents_one_by_one(tmp_path: Path, family: str, sizes: dict) -> None:
    module = made(tmp_path, family, sizes, restart_positions=True).double()
    expected = one_by_one(module)
    for names in (["documents"], ["document_ids"], ["document_ids", "positions"], ["position_ids"]):
        module.zero_grad()
        patch = patch_attention(module, CONFIG, documents=True)
        try:
            patch.dense()
            given = batch(*names)
            patch.set_documents(module.documents(given))
            loss = module.loss(given)
            loss.backward()
            losses = module.token_losses(given["tokens"][:, :-1], given["tokens"][:, 1:])
            patch.check()
        finally:
            patch.restore()
        found = [loss.detach(), *(parameter.grad for parameter in module.model.parameters())]
        for one, other in zip(found, expected, strict=True):
            # rotations are float32
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
        assert losses.mean().item() == pytest.approx(expected[0].item(), abs=1e-6)


def test_a_layer_with_a_shorter_window_is_refused_in_one_line(tmp_path: Path) -> None:
    module = made(tmp_path, "Gemma 3", restart_positions=True)
    patch = patch_attention(module, CONFIG, documents=True)
    try:
        patch.dense()
        patch.set_documents(module.documents(batch("documents")))
        with pytest.raises(
            CrossingError, match=r"would attend across documents: .*; it sees 16 tokens back"
        ) as refused:
            module.loss(batch("documents"))
        assert "\n" not in str(refused.value)
    finally:
        patch.restore()


@pytest.mark.parametrize("restart", [False, True], ids=["positions go on", "positions restart"])
def test_a_training_stays_inside_documents_in_both_phases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restart: bool
) -> None:
    # what a training leaves goes there
    monkeypatch.chdir(tmp_path)
    module = made(tmp_path, restart_positions=restart, activation_checkpointing=True, warmup_steps=0)
    callback = all_lighthouse(switch_at=0.5, attention=CONFIG, documents=True)
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = pl.Trainer(
        max_steps=4, max_epochs=-1, enable_model_summary=False, callbacks=[callback], val_check_interval=1, **settings
    )
    trainer.fit(module, *(DataLoader([batch("document_ids")] * 2, batch_size=None) for _ in range(2)))
    phases = callback.state_dict()["ledger"]["phases"]
    assert phases["lighthouse"]["routed_calls"] > 0
    # what one document holds changes nothing in another
    patch = patch_attention(module, CONFIG, documents=True)
    try:
        patch.on()
        patch.set_documents(module.documents(batch("documents")))
        tokens = batch()["tokens"][:, :-1]
        other = tokens.clone()
        other[:, : LENGTHS[0]] = (other[:, : LENGTHS[0]] + 1) % VOCABULARY
        one, two = (module.hidden(given, module.positions_set(given)) for given in (tokens, other))
    finally:
        patch.restore()
    assert torch.equal(one[:, LENGTHS[0] :], two[:, LENGTHS[0] :])
    assert not torch.equal(one[:, : LENGTHS[0]], two[:, : LENGTHS[0]])


def test_without_a_word_of_documents_a_packed_batch_is_refused(tmp_path: Path) -> None:
    module = made(tmp_path)
    with pytest.raises(PackedBatchError, match="this batch packs documents"):
        module.loss(batch("document_ids"))
    assert module.documents(batch()) is None
    asked = made(tmp_path / "other", restart_positions=True)
    with pytest.raises(ValueError, match="restart_positions=True, but the batch holds no documents"):
        asked.loss(batch())
