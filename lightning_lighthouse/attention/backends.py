"""Which backend runs the stages: `reference` (plain PyTorch, everywhere) or `kernels` (Triton, CUDA)."""

from __future__ import annotations

from types import ModuleType

import torch

from lightning_lighthouse.attention import reference
from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.notices import log_once, notice_once


def check_backend(config: LighthouseConfig, device: torch.device) -> None:
    """Raise ValueError or ImportError if the backend that `config` names cannot run on `device`."""
    choose_stages(config, device, torch.float32)


def choose_stages(config: LighthouseConfig, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The backend: the module that holds score, select, gather and scatter for `config` on `device`."""
    if config.backend == "reference" or (config.backend == "auto" and device.type != "cuda"):
        if config.backend == "auto":
            log_once("backend", f"backend='auto' runs 'reference' on {device.type}")
        return reference
    if config.backend == "auto" and dtype == torch.float64:
        notice_once("backend", "backend='auto' runs 'reference': the kernels have no float64; expect it to be slow")
        return reference
    try:
        # Triton is imported only where it is used
        from lightning_lighthouse.attention import kernels

        kernels.check_device(device)
    except (ImportError, ValueError) as error:
        if config.backend != "auto":
            raise
        notice_once("backend", f"backend='auto' runs 'reference', which is slow: {error}")
        return reference
    if dtype == torch.float64:
        raise ValueError("backend='triton' takes float16, bfloat16 or float32, got float64; use backend='reference'")
    if config.backend == "auto":
        log_once("backend", f"backend='auto' runs 'triton' on {device.type}")
    return kernels
