"""The training loss by liger-kernel's fused linear cross-entropy, where that package is installed and can run."""

# T tokens, W width of the model

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_lighthouse.checks import SettingError, quoted
from lightning_lighthouse.huggingface.head import cap_of, scale_of
from lightning_lighthouse.notices import log_once

# "chunked": this package's own, everywhere. "liger": liger-kernel's, on CUDA. "auto": the latter where it can run
LossBackend = Literal["auto", "chunked", "liger"]
INSTALL = "pip install 'lightning_lighthouse[liger]'"
LACKS = f"liger-kernel is not installed, whose loss is faster and keeps no logits in memory: {INSTALL}"


def check_installed(backend: LossBackend) -> None:
    """Raise SettingError where a package is asked for by name that is not installed."""
    if backend == "liger" and not _is_installed():
        raise SettingError(
            f"loss_backend='liger' needs the package liger-kernel, which is not installed: {INSTALL}, or choose "
            "loss_backend='chunked'"
        )


def is_fused(backend: LossBackend, device: torch.device) -> bool:
    """Whether liger-kernel computes the loss of tensors on `device`; what "auto" chose is said once.

    Raises:
        SettingError: It is asked for by name, and cannot run there.
    """
    # Triton's interpreter runs kernels on a CPU, to test them
    can_run = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "liger" and not can_run:
        raise SettingError(f"loss_backend='liger' runs on CUDA, got {device.type}: choose loss_backend='auto'")
    fused = is_fused_on_cuda(backend) and (backend == "liger" or device.type == "cuda")
    if backend == "auto":
        name = "liger" if fused else "chunked"
        why = "" if fused or device.type != "cuda" else f": {LACKS}"
        log_once("loss backend", f"loss_backend='auto' runs {quoted(name)} on {device.type}{why}")
    return fused


def is_fused_on_cuda(backend: LossBackend) -> bool:
    """Whether liger-kernel computes the loss of tensors on CUDA, by what is installed here."""
    return backend == "liger" or (backend == "auto" and _is_installed())


def fused_loss(model: Any, x_TW: Tensor, targets_T: Tensor) -> Tensor:
    """The sum of the cross-entropies in nats; its backward is exact for what this is multiplied by later.

    Args:
        model: Of transformers, of which the output layer is asked.
        x_TW: The last hidden states.
        targets_T: Token ids; -100 counts nothing.
    """
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    head, scale = model.get_output_embeddings(), scale_of(model)
    # gradients of the weights are summed over many chunks of tokens
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=cap_of(model), accum_dtype=torch.float32)
    if scale != 1:
        # what scales the logits scales what they are made of, the bias too
        x_TW = x_TW * scale
    bias = getattr(head, "bias", None)
    total: Tensor = loss(head.weight, x_TW, targets_T, bias if bias is None or scale == 1 else bias * scale)
    return total


def _is_installed() -> bool:
    return find_spec("liger_kernel") is not None
