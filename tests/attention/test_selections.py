"""The selections beside the published one: each against the oracle, and what no token may see of its future."""

from __future__ import annotations

import oracle
import pytest
import torch
from drawn import draw
from hypothesis import given, settings
from hypothesis import strategies as st
from selecting import BLIND, CASES, moved, small_tiles

from lightning_lighthouse import LighthouseConfig, lighthouse_attention, select_entries
from lightning_lighthouse.attention import reference


def choose(qkv, settings, step=None):
    shape = settings.pyramid(qkv[0].shape[2])
    return reference.select(reference.score(*qkv, shape, settings), shape, settings, step), shape


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    selection=st.sampled_from(["causal", "causal", "strided", "random"]),
    tokens=st.integers(5, 120),
    levels=st.integers(2, 4),
    p=st.integers(2, 5),
    top_k=st.integers(1, 13),
    tile_winners=st.integers(1, 5),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    cover_prefix=st.booleans(),
    coarse=st.booleans(),
    nans=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    step=st.integers(0, 10**6),
)
def test_selections_equal_the_oracle(
    selection, tokens, levels, p, top_k, tile_winners, heads, cover_prefix, coarse, nans, seed, step
):
    settings = LighthouseConfig(levels, p, top_k, selection=selection, cover_prefix=cover_prefix, seed=seed)
    q, k, v = draw(2, *heads, tokens, dim=3, seed=seed % 1000)
    if coarse:
        # many equal norms
        q, k = q.round(), k.round()
    if nans:
        q[:, :, ::7], k[:, :, ::5] = torch.nan, torch.nan
    tile = tile_winners if selection == "causal" else 4 * tile_winners
    _, chosen = oracle.attention(q, k, v, levels, p, top_k, cover_prefix, "sum", selection, tile, seed=seed, step=step)
    with small_tiles(tile_winners):
        (index, _slots), shape = choose((q, k, v), settings, torch.tensor(step))
    starts = torch.tensor([shape.start(level) for level in range(levels)])
    for b in range(2):
        for g in range(heads[1]):
            pairs = torch.tensor(chosen[b][g])
            assert torch.equal(index[b, g].long(), starts[pairs[:, 0]] + pairs[:, 1])


def test_tiles_of_32_winners_equal_the_oracle():
    settings = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=100, selection="causal")
    shape = settings.pyramid(1013)
    assert (shape.num_tiles, shape.winners[1]) == (3, 33)
    q, k, v = draw(1, 1, 1, 1013, dim=2)
    _, chosen = oracle.attention(q, k, v, 2, 2, 100, selection="causal", tile_winners=32)
    starts = [shape.start(level) for level in range(2)]
    index = select_entries(q, k, v, settings)
    assert index[0, 0].tolist() == [starts[level] + entry for level, entry in chosen[0][0]]


@pytest.mark.parametrize("selection", BLIND)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(**CASES)
def test_no_output_sees_a_later_token(selection, **case):
    assert not moved(selection, **case)


@pytest.mark.slow
@pytest.mark.parametrize("selection", BLIND)
@settings(max_examples=2000, deadline=None, derandomize=True)
@given(**CASES)
def test_no_output_sees_a_later_token_in_many_cases(selection, **case):
    assert not moved(selection, **case)


def test_the_published_selection_shows_later_tokens():
    """The leak that the others close: the same perturbation moves most outputs that it can reach."""
    cases = [(2, 4, 4), (3, 2, 5), (3, 3, 6), (2, 3, 9), (4, 2, 3)]
    leaks = [
        moved("published", 101, levels, p, top_k, 3, (2, 1), 1, last, seed)
        for seed, (levels, p, top_k) in enumerate(cases)
        for last in (20, 33, 52, 75)
    ]
    assert sum(leaks) >= len(leaks) / 2


@pytest.mark.parametrize("selection", BLIND)
def test_sizes_of_a_real_layer_show_no_later_token(selection):
    """The tiles as they are; a change of one token must reach later ones, or the test would see nothing."""
    settings = LighthouseConfig(3, 4, 256, selection=selection)
    q, k, v = draw(1, 2, 1, 12_007, dtype=torch.float32)
    shape = settings.pyramid(12_007)
    assert shape.compresses
    assert shape.num_tiles == (8 if selection == "causal" else 2)
    out = lighthouse_attention(q, k, v, settings)
    for last in (0, 1_501, 5_023, 11_998):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, last + 1] *= 9
        new = lighthouse_attention(*changed, settings)
        assert torch.equal(new[:, :, : last + 1], out[:, :, : last + 1])
        assert not torch.equal(new[:, :, last + 1 :], out[:, :, last + 1 :])


@pytest.mark.parametrize("selection", BLIND)
@pytest.mark.parametrize("scores", ["random", "nan", "equal"])
def test_counts_of_every_tile_and_level_are_exact(selection, scores):
    settings = LighthouseConfig(3, 3, 22, selection=selection)
    qkv = draw(2, 2, 2, 401)
    if scores == "nan":
        qkv = [torch.full_like(x, torch.nan) for x in qkv]
    if scores == "equal":
        qkv = [torch.ones_like(x) for x in qkv]
    with small_tiles(5):
        (index, slots), shape = choose(qkv, settings)
    assert shape.num_tiles == (4 if selection == "causal" else 1)
    for level in range(3):
        gathered = slots[:, :, shape.start(level) : shape.start(level + 1)] >= 0
        tiles = gathered.unflatten(-1, (shape.num_tiles, -1))
        assert (tiles.sum(-1) == shape.candidates(level)).all()
        if level < 2:
            # all children of a winner, or none
            families = tiles.unflatten(-1, (-1, 3)).sum(-1)
            assert ((families == 0) | (families == 3)).all()
            assert ((families == 3).sum(-1) == shape.winners[level + 1]).all()
    assert index.shape[-1] == shape.num_gathered


@pytest.mark.parametrize("selection", BLIND)
@pytest.mark.parametrize("tokens", [61, 200])
def test_every_token_gets_an_output(selection, tokens):
    settings = LighthouseConfig(4, 2, 4, selection=selection)
    q, k, _ = draw(2, 4, 2, tokens)
    fan_in = lighthouse_attention(q, k, torch.ones(2, 2, tokens, 8, dtype=torch.float64), settings)
    assert fan_in.round().min() >= 1


def test_one_causal_tile_is_strided():
    # with one winner more there are two tiles
    for top_k, same in ((63, True), (64, False)):
        indices = [
            select_entries(*draw(1, 2, 2, 901), LighthouseConfig(2, 3, top_k, selection=selection))
            for selection in ("causal", "strided")
        ]
        assert torch.equal(*indices) == same


@pytest.mark.parametrize("selection", ["causal", "strided"])
def test_the_prefix_is_covered_by_construction(selection):
    results = []
    for cover_prefix in (True, False):
        settings = LighthouseConfig(4, 2, 9, selection=selection, cover_prefix=cover_prefix)
        with small_tiles(3):
            (index, slots), shape = choose(draw(1, 2, 2, 203), settings)
        results.append(index)
        assert all((slots[:, :, shape.start(level)] >= 0).all() for level in range(4))
    assert torch.equal(*results)


def test_random_covers_the_prefix_where_it_is_told_to():
    for cover_prefix in (True, False):
        covered = []
        for step in range(20):
            settings = LighthouseConfig(3, 2, 3, selection="random", cover_prefix=cover_prefix)
            (_index, slots), _shape = choose(draw(1, 1, 1, 203), settings, torch.tensor(step))
            covered.append(bool((slots[:, :, 0] >= 0).all()))
        assert all(covered) == cover_prefix


@pytest.mark.parametrize(("scores", "share"), [("independent", 0.75), ("bursts", 0.4)])
def test_causal_winners_have_high_scores(scores, share):
    """Share of the top of each tile that wins, although nobody knows it in advance; evenly spaced winners have 1/8."""
    config = LighthouseConfig(2, 2, 2048, selection="causal")
    shape = config.pyramid(32_768)
    generator = torch.Generator().manual_seed(5)
    s_q, s_k = torch.randn(2, 1, 1, 32_768, generator=generator)
    if scores == "bursts":
        # 5 to 40 tokens that stand out, every 86 on average
        for start in torch.randint(32_768, (380,), generator=generator).tolist():
            s_q[..., start : start + int(torch.randint(5, 41, (), generator=generator))] += 2.5
    selection = reference.select(reference.pool_scores(s_q, s_k, shape, config), shape, config)
    assert (shape.num_tiles, shape.tile_entries, shape.winners[1]) == (64, 256, 32)
    won = (selection.slots[0, 0, : shape.entries(0) : 2] >= 0).view(64, -1)[1:]
    by_q = s_q[0, 0, ::2].reshape(64, -1)[1:]
    best = by_q >= by_q.topk(16, -1).values[:, -1:]
    found = float((won & best).sum() / best.sum())
    assert found >= share


def test_a_burst_does_not_break_the_counts_and_ends_at_the_cap():
    settings = LighthouseConfig(2, 2, 8, selection="causal")
    with small_tiles(4):
        shape = settings.pyramid(64)
        assert (shape.num_tiles, shape.tile_entries) == (2, 16)
        s_q = torch.zeros(1, 1, 64)
        # the second tile begins with eight scores above every one of the first tile
        s_q[..., 32:48] = 5
        s_k = torch.zeros(1, 1, 64)
        s_k[..., 62] = 1
        s_q[..., :32:2] = torch.linspace(0.1, 1, 16)
        s_k[..., :32:2] = torch.linspace(0.5, 0.1, 16)
        selection = reference.select(reference.pool_scores(s_q, s_k, shape, settings), shape, settings)
    won = (selection.slots[0, 0, :64:2] >= 0)[16:]
    # by s_q the first two of the burst; by s_k the one that reaches the threshold, and the last one for want of another
    assert won.nonzero().flatten().tolist() == [0, 1, 14, 15]


def test_strided_and_random_read_no_scores():
    nothing = [torch.full_like(x, torch.nan) for x in draw(1, 2, 1, 131)]
    for selection in ("strided", "random"):
        settings = LighthouseConfig(3, 2, 5, selection=selection)
        assert not settings.reads_scores
        shape = settings.pyramid(131)
        assert reference.score(*nothing, shape, settings)[0][0].shape == (1, 1, 0)
        assert torch.equal(select_entries(*nothing, settings), select_entries(*draw(1, 2, 1, 131), settings))


def test_random_depends_on_step_seed_and_head_alone():
    def index(tokens=131, step=None, seed=0, data=42):
        settings = LighthouseConfig(3, 2, 5, selection="random", seed=seed)
        step = None if step is None else torch.tensor(step)
        return choose(draw(3, 2, 2, tokens, seed=data), settings, step)[0].index

    base = index()
    # a second item of the batch, other values, and step 0 said aloud
    assert torch.equal(base[0], base[2])
    assert torch.equal(base, index(data=7))
    assert torch.equal(base, index(step=0))
    assert not torch.equal(base[:, 0], base[:, 1])
    assert not torch.equal(base, index(step=1))
    assert not torch.equal(base, index(seed=1))
    # one drawn after the other, not the same set moved on
    assert not torch.equal(index(step=1), index(seed=1))


def heads_in_two_calls(function, q, k, v, config, first=0):
    """What a function returns for all heads, and for the first key/value head and the others apart."""
    ratio = q.shape[1] // k.shape[1]
    whole = function(q, k, v, config, first_head=first)
    one = function(q[:, :ratio], k[:, :1], v[:, :1], config, first_head=first)
    others = function(q[:, ratio:], k[:, 1:], v[:, 1:], config, first_head=first + 1)
    return whole, torch.cat((one, others), 1)


@pytest.mark.parametrize("selection", ["random", "causal", "published"])
def test_heads_split_over_two_calls_are_those_of_one(selection):
    settings = LighthouseConfig(3, 2, 8, selection=selection)
    q, k, v = draw(2, 6, 3, 131)
    for function in (select_entries, lighthouse_attention):
        assert torch.equal(*heads_in_two_calls(function, q, k, v, settings))
    if selection == "random":
        index = [select_entries(q, k, v, settings, first_head=first) for first in (0, 2)]
        assert not torch.equal(index[0], index[1])
        assert torch.equal(index[0][:, 2], index[1][:, 0])


def test_the_number_of_a_head_is_a_count():
    q, k, v = draw(1, 1, 1, 64)
    for value, error in ((-1, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="first_head must be"):
            lighthouse_attention(q, k, v, first_head=value)


def test_random_draws_every_candidate_alike():
    settings = LighthouseConfig(2, 2, 8, selection="random", cover_prefix=False)
    shape = settings.pyramid(64)
    scores = reference.score(*draw(1, 4, 4, 64), shape, settings)
    drawn = torch.zeros(32)
    for step in range(400):
        slots = reference.select(scores, shape, settings, torch.tensor(step)).slots
        drawn += (slots[0, :, :64:2] >= 0).float().sum(0)
    # 8 of 32, 1600 times: 400 of each, standard deviation 17
    assert ((drawn - 400).abs() < 5 * 17).all()
