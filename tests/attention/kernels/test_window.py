"""The window kernels alone, in Triton's interpreter: any tile gives the reference, and the tiles fit where they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_lighthouse.attention.kernels import window_gradients, window_tiles
from lightning_lighthouse.attention.kernels.window import window_fwd
from lightning_lighthouse.attention.kernels.window_gradients import window_bwd
from lightning_lighthouse.attention.kernels.window_tiles import HOPPER, SMALL, Tile, tiles_for
from lightning_lighthouse.attention.reference import window_mask, window_reference

HELPERS = Path(__file__).parents[2] / "helpers"
on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels do not run on the CPU")

# queries and keys of a block: equal, more of one, more of the other, and more than tokens
SHAPES = [(32, 32), (32, 16), (16, 32), (64, 16), (128, 32), (32, 128)]


@on_the_cpu
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("window", "sinks"),
    [(1, 0), pytest.param(16, 3, marks=pytest.mark.slow), (37, 19), pytest.param(64, 0, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(("queries", "keys"), SHAPES)
def test_any_tile_gives_the_reference(queries, keys, window, sinks, monkeypatch):
    # several parts of few tokens
    monkeypatch.setattr(window_gradients, "PART", 32)
    generator = torch.Generator().manual_seed(42)
    q, k, v, dout = (torch.randn(1, 101, count, 5, generator=generator).transpose(1, 2) for count in (2, 1, 1, 2))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    truth = window_reference(*exact, window, sink_tokens=sinks, scale=0.3)
    truth = (truth, *torch.autograd.grad(truth, exact, dout.double()))
    tile = Tile(queries, keys, num_warps=4, num_stages=1)
    out, lse = window_fwd(q, k, v, window, sinks, 0.3, tile)
    gradients = window_bwd(dout, q, k, v, out, lse, window, sinks, 0.3, tile, tile)
    for actual, expected in zip((out, *gradients), truth, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    logits = (q @ k.repeat_interleave(2, 1).mT * 0.3).masked_fill(~window_mask(101, window, sinks), -torch.inf)
    torch.testing.assert_close(lse, logits.logsumexp(-1) / torch.tensor(2.0).log())


@on_the_cpu
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("queries", "keys", "window", "sinks", "front"),
    [(32, 16, 1, 0, 1), (16, 32, 37, 19, 55), (32, 32, 40, 3, 42), (64, 16, 64, 0, 63), (32, 128, 29, 5, 97)],
)
def test_queries_of_the_last_tokens_alone_give_what_they_give_among_all(
    queries, keys, window, sinks, front, monkeypatch
):
    monkeypatch.setattr(window_gradients, "PART", 16)
    generator = torch.Generator().manual_seed(7)
    q, k, v, dout = (torch.randn(2, 101, count, 5, generator=generator).transpose(1, 2) for count in (4, 2, 2, 4))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    truth = window_reference(*exact, window, sink_tokens=sinks, scale=0.3)[:, :, front:]
    dq, dk, dv = torch.autograd.grad(truth, exact, dout[:, :, front:].double())
    tile = Tile(queries, keys, num_warps=4, num_stages=1)
    q, dout = q[:, :, front:], dout[:, :, front:]
    out, lse = window_fwd(q, k, v, window, sinks, 0.3, tile)
    gradients = window_bwd(dout, q, k, v, out, lse, window, sinks, 0.3, tile, tile)
    for actual, expected in zip((out, *gradients), (truth, dq[:, :, front:], dk, dv), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [1, 63, 64, 65, 96, 128, 129, 256])
@pytest.mark.parametrize("window", [1, 2047, 2048, 100_000])
def test_there_are_tiles_for_every_head_dim_and_window(dim, window, monkeypatch):
    serving = next(size for size in (64, 128, 256) if dim <= size)
    assert tiles_for(dim, window, torch.device("cpu")) is SMALL[serving]
    monkeypatch.setattr(window_tiles, "_is_large", lambda device: True)
    assert tiles_for(dim, window, torch.device("cuda", 0)) is HOPPER[serving][window >= 2048]


@pytest.mark.slow
@pytest.mark.parametrize(("table", "capability", "kib"), [("SMALL", 86, 99), ("HOPPER", 90, 227)])
def test_the_tiles_fit_into_shared_memory(table, capability, kib):
    """The kernels, compiled for a GPU that is not here."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(HELPERS / "window_memory.py"), table, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    used = json.loads(done.stdout)
    assert len(used) == 4 * {"SMALL": 3, "HOPPER": 6}[table]
    assert 0 < min(used) <= max(used) <= kib * 1024
