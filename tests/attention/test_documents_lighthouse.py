"""Lighthouse inside documents: isolation, causality that hides where a document ends, no token without an output."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from drawn import draw
from packed import CASES, cut, documents_of, packed_case, run, spans
from selecting import small_tiles

from lightning_lighthouse import Documents, LighthouseConfig, lighthouse_attention
from lightning_lighthouse.attention import reference
from lightning_lighthouse.attention.documents_lighthouse import settle_documents
from lightning_lighthouse.attention.documents_sdpa import documents_sdpa
from lightning_lighthouse.attention.pyramid import PyramidShape
from lightning_lighthouse.attention.windows import chunk_attention, window_attention
from lightning_lighthouse.checks import LighthouseWarning

SELECTIONS = ["causal", "strided", "published", "random"]
# most tests here are about documents that Lighthouse gains on
pytestmark = pytest.mark.filterwarnings("ignore::lightning_lighthouse.LighthouseWarning")


@pytest.fixture(autouse=True)
def lighthouse_however_short(monkeypatch):
    """Documents of a few tokens are gathered too, where a batch of them would run dense."""
    monkeypatch.setattr("lightning_lighthouse.attention.documents_lighthouse._is_crowded", lambda *_: False)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("noise", ["tenfold", "nan"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_no_document_reads_another_one(case, noise, selection):
    with packed_case(case, selection) as (qkv, config, documents):
        out = run(qkv, config, documents)
        others = [x * torch.nan if noise == "nan" else 10 * x.flip(2) for x in qkv]
        for row, here in list(spans(documents))[1:3] or spans(documents):
            mixed = [y.clone() for y in others]
            for y, x in zip(mixed, qkv, strict=True):
                y[row, :, here] = x[row, :, here]
            assert torch.equal(run(mixed, config, documents)[row, :, here], out[row, :, here])


@pytest.mark.parametrize("selection", ["causal", "strided"])
@pytest.mark.parametrize("case", list(CASES.values())[:4], ids=list(CASES)[:4])
def test_no_output_knows_later_tokens_or_where_its_document_ends(case, selection):
    tokens, mean = case[3], case[8]
    case = (1, *case[1:])
    rng = random.Random(tokens)
    with packed_case(case, selection) as (qkv, config, documents):
        out = run(qkv, config, documents)
        for _ in range(4):
            last = rng.randrange(tokens - 1)
            ends = np.cumsum(documents.lengths[0])
            before = ends[ends <= last].tolist()
            start = before[-1] if before else 0
            # the document of `last` ends right behind it, where the sequence does, or between
            now, rest = last + 1 - start, tokens - start
            first = rng.choice([now, rest, rng.randint(now, rest)])
            lengths = [*np.diff([0, *before]).tolist(), first]
            lengths += cut(tokens - sum(lengths), mean, last)
            changed = [torch.cat((x[:, :, : last + 1], -3 * x[:, :, last + 1 :].flip(2)), 2) for x in qkv]
            other = run(changed, config, Documents([lengths]))
            # sums of other lengths are taken in another order
            assert (other - out)[:, :, : last + 1].abs().max() < 1e-11


def test_a_tile_as_long_as_the_document_would_show_its_end():
    """Why tiles are those of the whole sequence."""
    q, k, v = draw(1, 1, 1, 2000)
    config = LighthouseConfig(3, 4, 64)

    def output(tokens, by_length):
        m = -(-tokens // 16)
        tile = (1, m, (0, m // 4, m // 4)) if by_length else (-(-m // 128), 128, (0, 32, 32))
        shape = PyramidShape(tokens, 3, 4, *tile)
        qkv = [x[:, :, :tokens] for x in (q, k, v)]
        selection = reference.select(reference.score(*qkv, shape, config), shape, config)
        o = torch.nn.functional.scaled_dot_product_attention(*reference.gather(*qkv, selection, shape), is_causal=True)
        return reference.scatter(o, selection, shape, config)[:, :, :900]

    assert (output(1000, True) - output(900, True)).abs().max() > 1e-3
    assert torch.equal(output(1000, False), output(900, False))


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("tokens", [288, 307])
def test_one_document_is_a_sequence_without_documents(tokens, selection):
    with small_tiles(4):
        config = LighthouseConfig(3, 3, 32, selection=selection, combine="mean")
        shape = config.pyramid(tokens)
        if selection in ("published", "random"):
            # their last tile is in proportion
            tokens = shape.padded_tokens
        qkv = draw(2, 4, 2, tokens)
        assert config.pyramid(tokens).num_tiles > 1
        # tiles of nothing but padding are left out, which changes the order of sums
        difference = run(qkv, config, Documents([[tokens]] * 2)) - lighthouse_attention(*qkv, config)
        assert difference.abs().max() < 1e-12


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_token_has_an_output_and_prefixes_are_covered(case, selection):
    # outputs of ones are their fan-in
    with packed_case(case, selection, combine="sum") as ((q, k, v), config, documents):
        fan_in = run((q, k, torch.ones_like(v)), config, documents)
        # a partly filled last window is divided by its whole width, so its rows hold less than one
        assert (fan_in > 1e-6).all()


@pytest.mark.parametrize("selection", ["published", "random"])
def test_winners_of_a_last_tile_are_in_proportion(selection):
    # e windows of 4 tokens in a tile, of which 6 win; a document of 3 / 8 of a tile has ceil(6 x 3 / 8) winners
    shape = PyramidShape(512, 3, 2, 16, 8, (0, 8, 6))
    config = LighthouseConfig(3, 2, 100, selection=selection)
    for tokens, windows, tiles in ((10, 3, 1), (32, 8, 1), (41, 11, 2), (1, 1, 1)):
        own = shape.of_document(tokens)
        assert own.num_tiles == tiles
        q, k, v = draw(1, 1, 1, tokens)
        scores = reference.score(q, k, v, own, config)
        selected = reference.select_document(scores, own, config)
        whole, rest = (tiles - 1, windows - 8 * (tiles - 1))
        expected = [sum(part * count for part, count in ((whole, full), (1, -(-rest * full // 8)))) for full in (6, 8)]
        assert selected.index.shape[-1] == windows + 2 * sum(expected)
        if rest == 8:
            assert torch.equal(selected.index, reference.select(scores, own, config).index)


def test_a_document_draws_as_a_sequence_of_its_own():
    with packed_case(CASES["factor of 4, many tiles"], "random") as (qkv, config, _):
        documents = Documents([[97, 97, 407]])
        twice = [torch.cat((x[:, :, :97], x[:, :, :97], x[:, :, 194:]), 2) for x in qkv]
        out = run(twice, config, documents)
        assert torch.equal(out[:, :, :97], out[:, :, 97:194])
        later = run(twice, config, documents, step=torch.tensor(5))
        assert not torch.equal(later, out)


@pytest.mark.parametrize("selection", ["causal", "published"])
def test_gradients_are_exact_and_stay_in_their_document(selection):
    with small_tiles(2):
        config = LighthouseConfig(3, 2, 4, selection=selection, combine="mean")
        documents = Documents([[20, 1, 22], [43]])
        qkv = [x.requires_grad_() for x in draw(2, 2, 1, 43, dim=3)]
        assert config.pyramid(43).compresses
        assert torch.autograd.gradcheck(lambda *x: run(x, config, documents), qkv, fast_mode=True)
        out = run(qkv, config, documents)
        for x in torch.autograd.grad(out[0, :, 21:].sum(), qkv):
            assert x[0, :, 21:].abs().sum() > 0
            assert x[0, :, :21].abs().sum() == 0
            assert x[1].abs().sum() == 0


def test_where_nothing_is_compressed_documents_are_dense():
    config = LighthouseConfig(3, 4, 64)
    qkv = draw(1, 2, 1, 96)
    assert not config.pyramid(96).compresses
    documents = Documents([[40, 5, 51]])
    out = run(qkv, config, documents)
    for _, here in spans(documents):
        torch.testing.assert_close(out[:, :, here], lighthouse_attention(*(x[:, :, here] for x in qkv), config))


def test_dilated_scores_know_no_documents_yet():
    with small_tiles(2):
        qkv, documents = draw(1, 1, 1, 200), Documents([[100, 100]])
        line = 'scorer=\'dilated\' does not know documents yet; use "norm", or selection="strided"'
        with pytest.raises(ValueError, match=line):
            run(qkv, LighthouseConfig(3, 2, 8, scorer="dilated"), documents)
        assert run(qkv, LighthouseConfig(3, 2, 8, scorer="dilated", selection="strided"), documents).isfinite().all()


def test_documents_of_another_batch_are_refused():
    with pytest.raises(ValueError, match=r"documents cover 1 x 100 tokens, q has 2 x 100; .*drop_last"):
        run(draw(2, 1, 1, 100), LighthouseConfig(), Documents([[100]]))


@pytest.mark.parametrize("given", [[[50, 50]], torch.zeros(1, 100)], ids=["lengths", "ids"])
def test_what_is_no_documents_is_refused(given):
    qkv = draw(1, 1, 1, 100)
    for attend in (
        lambda: run(qkv, LighthouseConfig(), given),
        lambda: window_attention(*qkv, 7, documents=given),
        lambda: chunk_attention(*qkv, 7, documents=given),
    ):
        with pytest.raises(TypeError, match=r"must be lightning_lighthouse\.Documents or None, got ") as caught:
            attend()
        assert "\n" not in str(caught.value)


def test_documents_are_no_sequence_of_compiled_frames():
    """A batch with other documents finds the frames of the first."""
    from torch._dynamo.testing import CompileCounterWithBackend

    with packed_case(CASES["short ones"]) as (qkv, config, documents):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(lambda q, k, v, d: run((2 * q, k, v), config, d) + q, backend=counter, dynamic=False)
        frames = []
        for some in (documents, Documents([[256]]), documents_of(1, 256, 90, seed=3)):
            torch.testing.assert_close(compiled(*qkv, some), run((2 * qkv[0], *qkv[1:]), config, some) + qkv[0])
            frames.append(counter.frame_count)
        assert frames[0] == frames[-1]
        torch._dynamo.reset()


class TestDense:
    """Batches that are better off dense."""

    @pytest.fixture(autouse=True)
    def lighthouse_however_short(self, monkeypatch):
        from lightning_lighthouse import notices

        monkeypatch.setattr(notices, "_given", set())

    @pytest.mark.filterwarnings("default::lightning_lighthouse.LighthouseWarning")
    def test_sequences_that_are_not_compressed_are_told_as_ever(self):
        documents = Documents([[40, 56]])
        with pytest.warns(LighthouseWarning, match="96 tokens are too short to gain") as told:
            run(draw(1, 1, 1, 96), LighthouseConfig(3, 4, 64), documents)
        assert len(told) == 1
        assert not settle_documents(documents, LighthouseConfig(3, 4, 64))

    @pytest.mark.filterwarnings("default::lightning_lighthouse.LighthouseWarning")
    @pytest.mark.parametrize(
        ("most", "documents", "words"),
        [
            (2, [[100, 100, 312]], "3 documents in a batch exceed max_documents=2 x 1: it trains dense; if many"),
            (200, [[4] * 128], "too short to gain: of 512 tokens Lighthouse would gather"),
        ],
    )
    def test_too_many_or_too_short_documents_are_dense_and_told_once(self, most, documents, words):
        with small_tiles(2):
            config = LighthouseConfig(3, 2, 16, max_documents=most)
            qkv, documents = draw(1, 2, 1, 512), Documents(documents)
            with pytest.warns(LighthouseWarning, match=words) as told:
                outputs = [run(qkv, config, documents) for _ in range(2)]
            assert len(told) == 1
            assert torch.equal(outputs[1], documents_sdpa(*qkv, documents))
            fewer = Documents([[300, 212]])
            assert not torch.equal(run(qkv, config, fewer), documents_sdpa(*qkv, fewer))
