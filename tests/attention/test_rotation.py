"""rotate="after": pooled entries are means of unrotated tokens, rotated at the last token that they cover."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from drawn import draw
from packed import CASES, packed_case, run, spans
from selecting import BLIND, small_tiles
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_lighthouse import LighthouseConfig, lighthouse_attention
from lightning_lighthouse.attention import documents_lighthouse, reference
from lightning_lighthouse.attention.rotation import Rotation
from lightning_lighthouse.attention.sdpa import causal_sdpa
from lightning_lighthouse.checks import SettingError

# tokens, levels, pooling factor, head dim, channels that are rotated
SHAPES = {
    "prime, padded": (103, 3, 4, 8, 8),
    "odd factor": (101, 3, 3, 6, 6),
    "four levels": (131, 4, 2, 8, 8),
    "two levels, part of the channels": (61, 2, 4, 10, 6),
    "whole windows": (96, 3, 2, 4, 2),
}
PAIRINGS = ["half", "interleaved"]


def frequencies(rotated, dtype=torch.float64):
    return 50.0 ** (-torch.arange(0, rotated, 2, dtype=dtype) / rotated)


def rotated_at(x, positions, rotation):
    """`[..., N, D]` rotated at positions, as complex numbers: nothing shared with the package."""
    rotated = 2 * len(rotation.inv_freq)
    head, rest = x[..., :rotated], x[..., rotated:]
    is_half = rotation.pairing == "half"
    first, second = head.chunk(2, -1) if is_half else (head[..., ::2], head[..., 1::2])
    angles = positions.to(x.dtype).unsqueeze(-1) * rotation.inv_freq.to(x.dtype)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    parts = (turned.real, turned.imag)
    head = torch.cat(parts, -1) if is_half else torch.stack(parts, -1).flatten(-2)
    return torch.cat((head, rest), -1)


def rotated(x, rotation):
    return rotated_at(x, torch.arange(x.shape[2]), rotation)


def directly(x, index, shape, rotation):
    """Entries pooled from unrotated tokens, then rotated at the last token that they cover."""
    padded = F.pad(x, (0, 0, 0, shape.padded_tokens - shape.num_tokens))
    levels = []
    for level in range(shape.num_levels):
        window = shape.window(level)
        last = (torch.arange(shape.entries(level)) + 1) * window - 1
        levels.append(rotated_at(padded.unflatten(2, (-1, window)).mean(3), last, rotation))
    rows = index.repeat_interleave(x.shape[1] // index.shape[1], 1).long()
    return torch.cat(levels, 2).gather(2, rows.unsqueeze(-1).expand(-1, -1, -1, x.shape[3]))


def case(shape, pairing, selection="causal", seed=42, **more):
    tokens, levels, p, dim, channels = SHAPES[shape]
    q, k, v = draw(2, 4, 2, tokens, dim, seed=seed)
    config = LighthouseConfig(levels, p, 9, selection=selection, rotate="after", **more)
    return (q, k, v), config, Rotation(frequencies(channels), pairing)


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("selection", ["causal", "published", "strided", "random"])
def test_it_is_the_direct_form(shape, pairing, selection):
    (q, k, v), config, rotation = case(shape, pairing, selection)
    seen = rotated(q, rotation), rotated(k, rotation), v
    with small_tiles(3):
        sizes = config.pyramid(q.shape[2])
        assert sizes.compresses
        # by norms, which no rotation changes: those of the unrotated tokens
        chosen = reference.select(reference.score(q, k, v, sizes, config), sizes, config)
        out = lighthouse_attention(*seen, config, rotation=rotation)
    qs, ks = (directly(x, chosen.index, sizes, rotation) for x in (q, k))
    vs = reference.gather(q, k, v, chosen, sizes)[2]
    expected = reference.scatter(causal_sdpa(qs, ks, vs, scale=None, backend="math"), chosen, sizes, config)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(out, lighthouse_attention(*seen, LighthouseConfig(*sizes_of(config))), atol=1e-3)


def sizes_of(config):
    return config.num_levels, config.pooling_factor, config.top_k


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_gradients_are_those_of_the_function(pairing):
    config = LighthouseConfig(3, 2, 3, selection="strided", rotate="after", sdpa="math")
    rotation = Rotation(frequencies(4), pairing)
    qkv = [x.requires_grad_() for x in draw(1, 2, 1, 29, 6)]
    assert config.pyramid(29).compresses
    attend = lambda *qkv: lighthouse_attention(*qkv, config, rotation=rotation)  # noqa: E731
    assert torch.autograd.gradcheck(attend, qkv, fast_mode=True)


@pytest.mark.parametrize("selection", BLIND)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_output_sees_a_later_token(shape, selection):
    qkv, config, rotation = case(shape, "half", selection)
    tokens = qkv[0].shape[2]
    with small_tiles(2):
        out = lighthouse_attention(*qkv, config, rotation=rotation)
        for last in (0, tokens // 3, tokens // 2, tokens - 2):
            changed = [torch.cat((x[:, :, : last + 1], -3 * x[:, :, last + 1 :].flip(2)), 2) for x in qkv]
            new = lighthouse_attention(*changed, config, rotation=rotation)
            assert torch.equal(new[:, :, : last + 1], out[:, :, : last + 1])
            # a last token that is not gathered moves nothing
            assert last > tokens // 2 or not torch.equal(new[:, :, last + 1 :], out[:, :, last + 1 :])


def test_before_reads_no_rotation():
    qkv, config, rotation = case("prime, padded", "half")
    before = LighthouseConfig(*sizes_of(config))
    assert before.rotate == "before"
    out = lighthouse_attention(*qkv, before)
    assert torch.equal(lighthouse_attention(*qkv, before, rotation=rotation), out)
    # by no angle at all, every entry is the mean of what came
    still = Rotation(torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(lighthouse_attention(*qkv, config, rotation=still), out)


@pytest.mark.filterwarnings("ignore::lightning_lighthouse.LighthouseWarning")
@pytest.mark.parametrize("name", ["grouped heads, two sequences", "four levels"])
def test_each_document_is_a_sequence_of_its_own(name, monkeypatch):
    monkeypatch.setattr(documents_lighthouse, "_is_crowded", lambda *_: False)
    rotation = Rotation(frequencies(4), "interleaved")
    with packed_case(CASES[name], "strided", rotate="after") as (qkv, config, documents):
        out = run(qkv, config, documents, rotation=rotation)
        shape = config.pyramid(documents.num_tokens)
        for row, span in spans(documents):
            q, k, v = (x[row : row + 1, :, span] for x in qkv)
            own = shape.of_document(q.shape[2])
            chosen = reference.select_document(reference.score(q, k, v, own, config), own, config)
            # what stands at the positions of the document is as if it had been rotated there
            qs, ks = (
                directly(rotated_at(x, -torch.arange(x.shape[2]), rotation), chosen.index, own, rotation)
                for x in (q, k)
            )
            vs = reference.gather(q, k, v, chosen, own)[2]
            expected = reference.scatter(causal_sdpa(qs, ks, vs, scale=None, backend="math"), chosen, own, config)
            torch.testing.assert_close(out[row : row + 1, :, span], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pairing", ["half", pytest.param("interleaved", marks=pytest.mark.slow)])
def test_a_compiled_frame_has_no_break_and_follows_the_frequencies(pairing):
    qkv, config, rotation = case("prime, padded", pairing)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def attend(q, k, v, inv_freq):
        return lighthouse_attention(q, k, v, config, rotation=Rotation(inv_freq, pairing))

    for scale in (1.0, 0.3):
        other = Rotation(rotation.inv_freq * scale, pairing)
        expected = lighthouse_attention(*qkv, config, rotation=other)
        torch.testing.assert_close(attend(*qkv, other.inv_freq), expected)
    assert counter.frame_count == 1


def test_a_table_is_made_once_and_anew_where_the_frequencies_change():
    rotation = Rotation(frequencies(8))
    like = torch.zeros(1, 1, 3, 12)
    table = rotation.steps(4, 2, like)
    assert rotation.steps(4, 2, like) is table
    assert (table.shape, table.dtype) == ((2, 2, 12), torch.float32)
    rotation.inv_freq.mul_(0.5)
    changed = rotation.steps(4, 2, like)
    torch.testing.assert_close(changed, Rotation(frequencies(8) / 2).steps(4, 2, like))
    with torch.inference_mode():
        rotation.steps(4, 2, like)
    # one of inference could not be kept for a backward
    assert not rotation.steps(4, 2, like).is_inference()


def test_what_does_not_fit_is_refused():
    qkv, config, _ = case("prime, padded", "half")
    with pytest.raises(SettingError, match="pass rotation=Rotation"):
        lighthouse_attention(*qkv, config)
    with pytest.raises(ValueError, match="10 channels does not fit into a head dim of 8"):
        lighthouse_attention(*qkv, config, rotation=Rotation(frequencies(10)))
    with pytest.raises(ValueError, match=r"got torch.int64 \[3\]"):
        Rotation(torch.arange(3))
    with pytest.raises(ValueError, match="'half' or 'interleaved', got 'pairs'"):
        Rotation(frequencies(4), "pairs")
    with pytest.raises(ValueError, match="rotate must be one of 'before', 'after'"):
        LighthouseConfig(rotate="late")
