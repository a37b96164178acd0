"""The fused loss of liger-kernel: equal to the chunked one; what is chosen, and refused, where it cannot run."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrained import draw_tokens, save_model

from lightning_lighthouse import notices
from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.huggingface import fused_loss

pytest.importorskip("transformers", reason="needs the extra hf")

from lightning_lighthouse.huggingface import HuggingFaceDecoder

LIGER = pytest.mark.skipif(find_spec("liger_kernel") is None, reason="needs the package liger-kernel")
FAMILIES = {
    "Llama": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "a bias": ("Phi", {}),
    "scaled": ("Granite", {}),
    "capped": ("Gemma 3", {"final_logit_softcapping": 3.0}),
}


def made(folder: str, backend: str, device: str = "cpu") -> HuggingFaceDecoder:
    module = HuggingFaceDecoder(folder, loss_backend=backend, loss_chunk=17)
    module.configure_model()
    return module.to(device)


def assert_equal(one: HuggingFaceDecoder, other: HuggingFaceDecoder, tokens: torch.Tensor) -> None:
    losses = [module.loss(tokens) for module in (one, other)]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-5)
    for loss in losses:
        # what is multiplied later, as by an accumulation
        (loss / 3).backward()
    for (name, ours), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


@LIGER
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
# the interpreter does not know what the kernel does with a cap
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "capped"])
def test_loss_and_gradients_are_those_of_chunks(tmp_path: Path, name: str) -> None:
    family, sizes = FAMILIES[name]
    folder = save_model(tmp_path / "model", family, **sizes)
    assert_equal(made(folder, "liger"), made(folder, "chunked"), draw_tokens())


@LIGER
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("family", "sizes"), FAMILIES.values(), ids=FAMILIES)
def test_on_a_gpu_loss_and_gradients_are_those_of_chunks(tmp_path: Path, family: str, sizes: dict) -> None:
    folder = save_model(tmp_path / "model", family, **sizes)
    assert_equal(made(folder, "auto", "cuda"), made(folder, "chunked", "cuda"), draw_tokens().cuda())


CHOICES = [("cuda", 1, "liger"), ("cuda", 0, "chunked"), ("cpu", 1, "chunked")]


@pytest.mark.parametrize(("device", "installed", "chosen"), CHOICES)
def test_what_is_chosen_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: Any, device: str, installed: int, chosen: str
) -> None:
    monkeypatch.setattr(notices, "_given", set())
    monkeypatch.setattr(fused_loss, "find_spec", lambda name: installed or None)
    with caplog.at_level(logging.INFO):
        assert fused_loss.is_fused("auto", torch.device(device)) == (chosen == "liger")
        fused_loss.is_fused("auto", torch.device(device))
    lines = [line for line in caplog.messages if "loss_backend" in line]
    told = ": liger-kernel is not installed, whose loss is faster and keeps no logits in memory: pip install"
    assert len(lines) == 1
    assert lines[0].startswith(f"loss_backend='auto' runs {chosen!r} on {device}")
    # what installing it would change
    assert (told in lines[0]) == (device == "cuda" and not installed)


def test_what_cannot_run_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path / "model")
    with pytest.raises(ValueError, match="loss_backend must be one of 'auto', 'chunked', 'liger', got 'fused'"):
        HuggingFaceDecoder(folder, loss_backend="fused")
    monkeypatch.setattr(fused_loss, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"loss_backend='liger' needs the package liger-kernel.*pip install"):
        HuggingFaceDecoder(folder, loss_backend="liger")
    monkeypatch.setattr(fused_loss, "find_spec", lambda name: 1)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    module = made(folder, "liger")
    with pytest.raises(SettingError, match="loss_backend='liger' runs on CUDA, got cpu"):
        module.loss(draw_tokens())
