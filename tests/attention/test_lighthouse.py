"""The public function: shapes refused in one line, dense where there is nothing to gain, repeatable."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from warned import own_warnings

from lightning_lighthouse import LighthouseConfig, lighthouse_attention, notices, select_entries


def draw(*shape, dtype=torch.float32):
    return tuple(torch.randn(*shape, generator=torch.Generator().manual_seed(i), dtype=dtype) for i in range(3))


def test_a_short_sequence_is_dense_with_one_notice(monkeypatch):
    monkeypatch.setattr(notices, "_given", set())
    with own_warnings() as lines:
        for tokens in (40, 41, 50):
            q, k, v = draw(1, 2, tokens, 8)
            out = lighthouse_attention(q, k, v)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    assert [("too short" in line) for line in lines] == [True]


def test_a_coarsest_level_within_the_budget_still_selects_below():
    # 8 coarsest entries, all of them win; the finer levels still choose
    config = LighthouseConfig(num_levels=3, pooling_factor=4, top_k=8, selection="published")
    q, k, v = draw(1, 1, 128, 8)
    shape = config.pyramid(128)
    assert (shape.tile_entries, shape.winners, shape.num_gathered) == (8, (0, 8, 8), 72)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert not torch.allclose(lighthouse_attention(q, k, v, config), dense, atol=1e-2)


@pytest.mark.parametrize("scorer", ["norm", "dilated"])
def test_scale_reaches_the_attention_and_the_scorer(scorer):
    config = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=4, scorer=scorer, selection="published")
    q, k, v = draw(1, 2, 101, 16)
    torch.testing.assert_close(
        lighthouse_attention(q, k, v, config, scale=0.5), lighthouse_attention(q * 2, k, v, config)
    )
    assert torch.equal(select_entries(q, k, v, config, scale=0.5), select_entries(q * 2, k, v, config))
    is_other = not torch.equal(select_entries(q, k, v, config, scale=4.0), select_entries(q, k, v, config))
    assert is_other == (scorer == "dilated")


def test_two_runs_agree_bit_for_bit():
    config = LighthouseConfig(num_levels=3, pooling_factor=2, top_k=6, selection="published")
    results = []
    for _ in range(2):
        q, k, v = (x.requires_grad_() for x in draw(2, 4, 211, 8))
        out = lighthouse_attention(q, k, v, config)
        out.square().sum().backward()
        results.append((out, q.grad, k.grad, v.grad))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_the_selection_carries_no_gradient_and_no_graph():
    q, k, v = (x.requires_grad_() for x in draw(1, 2, 101, 8))
    index = select_entries(q, k, v, LighthouseConfig(num_levels=2, top_k=4, selection="published"))
    assert index.dtype == torch.int32
    assert not index.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_output_keeps_the_dtype(dtype):
    q, k, v = draw(1, 2, 101, 8, dtype=dtype)
    assert lighthouse_attention(q, k, v, LighthouseConfig(num_levels=2, top_k=4, selection="published")).dtype == dtype


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, v: (q[0], k, v), "must be [batch, heads, tokens, head dim]"),
        (lambda q, k, v: (q, k[:, :, :-1], v[:, :, :-1]), "tokens and head dim of q"),
        (lambda q, k, v: (q, k, v[..., :-1]), "must have one shape"),
        (lambda q, k, v: (q, k[:, :0], v[:, :0]), "at least one head"),
        (lambda q, k, v: (q[:, :3], k[:, :2], v[:, :2]), "multiple of the key/value heads"),
        (lambda q, k, v: (q, k.double(), v), "one floating dtype"),
        (lambda q, k, v: (q.long(), k.long(), v.long()), "one floating dtype"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_in_one_line(change, words):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        lighthouse_attention(
            *change(*draw(2, 4, 101, 8)), LighthouseConfig(num_levels=2, top_k=4, selection="published")
        )
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_autocast_casts_as_it_does_for_the_builtin():
    config = LighthouseConfig(num_levels=2, top_k=4, selection="published")
    q, k, v = draw(1, 2, 101, 8)
    with torch.autocast("cpu", torch.bfloat16):
        # fp32 q and k beside a bf16 v: a rotation in fp32
        out = lighthouse_attention(q, k, v.bfloat16(), config)
    assert torch.equal(out, lighthouse_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), config))


def test_a_backend_that_cannot_run_raises_and_auto_never_does():
    q, k, v = draw(1, 1, 101, 8)
    assert (
        lighthouse_attention(q, k, v, LighthouseConfig(num_levels=2, top_k=4, backend="auto", selection="published"))
        .isfinite()
        .all()
    )
    if torch.cuda.is_available():
        return
    code = (
        "import torch; from lightning_lighthouse import LighthouseConfig, lighthouse_attention;"
        "q = torch.randn(1, 1, 101, 8);"
        "lighthouse_attention(q, q, q, LighthouseConfig(num_levels=2, top_k=4, backend='triton'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"}
    )
    assert "ValueError: backend='triton' needs a CUDA device, q is on cpu" in done.stderr


def test_compiled_whole_equals_eager():
    config = LighthouseConfig(num_levels=3, pooling_factor=2, top_k=6, backend="reference", selection="published")
    q, k, v = draw(1, 2, 211, 8)
    compiled = torch.compile(lighthouse_attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, config), lighthouse_attention(q, k, v, config))


def test_meta_tensors_have_the_shape_of_the_output():
    q, k = torch.empty(2, 4, 1024, 16, device="meta"), torch.empty(2, 2, 1024, 16, device="meta")
    assert lighthouse_attention(q, k, k, LighthouseConfig(top_k=8, selection="published")).shape == q.shape


@pytest.mark.parametrize("scorer", ["norm", "dilated"])
@pytest.mark.parametrize("selection", ["published", "random"])
def test_the_kernels_refuse_float64(scorer, selection):
    q = torch.randn(1, 1, 256, 16, dtype=torch.float64)
    config = LighthouseConfig(top_k=4, backend="triton", scorer=scorer, selection=selection)
    with pytest.raises(ValueError, match="takes float16, bfloat16 or float32, got float64"):
        lighthouse_attention(q, q, q, config)
