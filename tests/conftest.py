"""Shared by all tests: kernels run under Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os

import torch

# Triton reads this once, when it is first imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
