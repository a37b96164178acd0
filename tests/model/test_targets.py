"""What a loss counts: labels as transformers has them, padding never as text; Decoder and HuggingFaceDecoder alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from pretrained import VOCABULARY, draw_tokens, load_model, save_model
from torch.utils.data import DataLoader

from lightning_lighthouse import LighthouseConfig, patch_attention
from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.model import Decoder
from lightning_lighthouse.model.language_model import LanguageModel
from lightning_lighthouse.model.targets import UNREAD

TOKENS = draw_tokens()
# a prompt and the end of a text are left out, and whole chunks of 17 tokens
LABELS = TOKENS.clone()
LABELS[0, :20] = LABELS[:, 70:] = -100
# some are other than the tokens
LABELS[1, 5:9] = 3
CONFIG = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=8)


@pytest.fixture(params=["Decoder", "HuggingFaceDecoder"])
def module(request: pytest.FixtureRequest, tmp_path: Path) -> LanguageModel:
    if request.param == "Decoder":
        sizes = {"num_layers": 2, "dim": 48, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 40}
        torch.manual_seed(0)
        return Decoder(**sizes, vocab_size=VOCABULARY, loss_chunk=17)
    pytest.importorskip("transformers", reason="needs the extra hf")
    from lightning_lighthouse.huggingface import HuggingFaceDecoder

    found = HuggingFaceDecoder(save_model(tmp_path / "model"), loss_chunk=17, loss_backend="chunked")
    found.configure_model()
    return found


def gradients(module: torch.nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    module.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in module.parameters()]


def test_labels_are_what_is_predicted_and_nothing_where_they_are_left_out(module: LanguageModel) -> None:
    loss = module.loss({"tokens": TOKENS, "labels": LABELS})
    expected = F.cross_entropy(module(TOKENS[:, :-1]).flatten(0, 1), LABELS[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    for one, other in zip(gradients(module, loss), gradients(module, expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    plain = module.loss(TOKENS)
    assert torch.equal(module.loss({"tokens": TOKENS, "labels": TOKENS}), plain)
    assert abs(plain - loss) > 1e-3


def test_the_loss_of_labels_is_that_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra hf")
    from lightning_lighthouse.huggingface import HuggingFaceDecoder

    ours = HuggingFaceDecoder(save_model(tmp_path / "model"))
    ours.configure_model()
    wanted = load_model(str(tmp_path / "model")).train()(input_ids=TOKENS, labels=LABELS).loss
    torch.testing.assert_close(ours.loss({"tokens": TOKENS, "labels": LABELS}), wanted)


def test_a_batch_without_a_target_trains_nothing(module: LanguageModel) -> None:
    loss = module.loss({"tokens": TOKENS, "labels": torch.full_like(TOKENS, -100)})
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients(module, loss))


PADDED = torch.ones_like(TOKENS).index_fill_(1, torch.arange(80, 97), 0)


@pytest.mark.parametrize("length", [96, 97])
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_padding_is_refused_and_a_mask_of_ones_is_not(module: LanguageModel, length: int, dtype: torch.dtype) -> None:
    plain = module.loss(TOKENS)
    ones = torch.ones_like(TOKENS).to(dtype)[:, :length]
    assert torch.equal(module.loss({"tokens": TOKENS, "attention_mask": ones}), plain)
    for mask in (PADDED, PADDED.flip(1)):
        with pytest.raises(SettingError, match="attention_mask of this batch has zeros, and padding would be") as said:
            module.loss({"tokens": TOKENS, "attention_mask": mask[:, :length].to(dtype), "labels": LABELS})
        assert "\n" not in str(said.value)


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "short labels": ({"labels": LABELS[:, 1:]}, r"labels must be int64, .* got torch.int64 \[2, 96\]"),
    "labels of floats": ({"labels": LABELS.float()}, r"labels must be int64, as long as the tokens, \[2, 97\]"),
    "a mask of pairs": ({"attention_mask": torch.ones(2, 1, 96, 96)}, r"attention_mask must be \[2, 97\] or \[2, 96\]"),
    **{name: ({name: TOKENS}, f"{name} of this batch would change the loss, and is not read here") for name in UNREAD},
}


@pytest.mark.parametrize(("held", "line"), FAULTS.values(), ids=FAULTS)
def test_what_would_change_the_loss_is_never_passed_over(
    module: LanguageModel, held: dict[str, Any], line: str
) -> None:
    with pytest.raises(SettingError, match=line):
        module.loss({"tokens": TOKENS, **held})
    assert torch.equal(module.loss({"tokens": TOKENS, **dict.fromkeys(held)}), module.loss(TOKENS))


@pytest.mark.parametrize("with_labels", [False, True], ids=["", "labels"])
def test_padding_behind_documents_that_a_mask_numbers_is_no_text(module: LanguageModel, with_labels: bool) -> None:
    module = module.double()
    lengths, tokens = [41, 30], TOKENS[:1]
    segments = torch.tensor([[1] * 41 + [2] * 30 + [0] * 26])
    batch = {"tokens": tokens, "attention_mask": segments, **({"labels": LABELS[1:]} if with_labels else {})}
    with patch_attention(module, CONFIG, documents=True) as patch:
        patch.dense()
        documents = module.documents(batch)
        assert documents is not None
        patch.set_documents(documents)
        loss = module.loss(batch)
        found = gradients(module, loss)
    # each by itself: with its own positions, which rotations do not tell apart
    logits = torch.cat([module(part) for part in tokens[:, :71].split(lengths, 1)], 1)
    targets = batch.get("labels", tokens).masked_fill(segments == 0, -100)[:, 1:72]
    expected = F.cross_entropy(logits[0], targets[0])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    for one, other in zip(found, gradients(module, expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    # documents that are told otherwise do not keep it apart
    held = {**batch, "document_ids": torch.zeros_like(segments)}
    with patch_attention(module, CONFIG, documents=True) as patch:
        patch.dense()
        patch.set_documents(module.documents(held))
        with pytest.raises(SettingError, match="has zeros"):
            module.loss(held)


def test_a_validation_weighs_batches_by_their_targets(module: LanguageModel, tmp_path: Path) -> None:
    batches = [{"tokens": TOKENS, "labels": TOKENS.clone()}, {"tokens": TOKENS.flip(1), "labels": LABELS}]
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    (found,) = trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)
    total = sum(
        F.cross_entropy(
            module(batch["tokens"][:, :-1]).flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )
        for batch in batches
    )
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    assert found["val/loss"] == pytest.approx(total.item() / count, abs=1e-5)
    padded = DataLoader([{"tokens": TOKENS, "attention_mask": PADDED}], batch_size=None)
    with pytest.raises(SettingError, match="has zeros"):
        trainer.validate(module, padded, verbose=False)
