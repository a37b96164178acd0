"""The naive twin of torch's flash kernel with a window, so that the operator around it runs without a GPU."""

from __future__ import annotations

import torch


def forward(q_BNHD, k_BNGD, v_BNGD, window, scale):
    """As `flash_window.flash_forward`, in float64."""
    q, k, v = _per_query_head(q_BNHD, k_BNGD, v_BNGD)
    logits = _logits(q, k, window, scale)
    out = torch.empty_like(q_BNHD).copy_((logits.softmax(-1) @ v).transpose(1, 2))
    return out, logits.logsumexp(-1).float()


def backward(dout_BNHD, q_BNHD, k_BNGD, v_BNGD, out_BNHD, lse_BHN, window, scale):
    """As `flash_window.flash_backward`: it believes the output and the log-sum-exp that it is handed."""
    assert dout_BNHD.is_contiguous()
    assert out_BNHD.is_contiguous()
    q, k, v = _per_query_head(q_BNHD, k_BNGD, v_BNGD)
    dout, out = (x.transpose(1, 2).double() for x in (dout_BNHD, out_BNHD))
    p = (_logits(q, k, window, scale) - lse_BHN.double().unsqueeze(-1)).exp()
    ds = p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)) * scale
    groups = k_BNGD.shape[2]
    dk, dv = (x.unflatten(1, (groups, -1)).sum(2) for x in (ds.mT @ q, p.mT @ dout))
    likes = (q_BNHD, k_BNGD, v_BNGD)
    return tuple(torch.empty_like(x).copy_(dx.transpose(1, 2)) for x, dx in zip(likes, (ds @ k, dk, dv), strict=True))


def _per_query_head(q, *kv):
    q, *kv = (x.transpose(1, 2).double() for x in (q, *kv))
    return q, *(x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in kv)


def _logits(q, k, window, scale):
    token = torch.arange(q.shape[2])
    distance = token.unsqueeze(1) - token
    return (q @ k.mT * scale).masked_fill((distance < 0) | (distance >= window), -torch.inf)
