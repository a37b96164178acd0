"""Settings are checked once, and every error quotes what came and what is allowed."""

from __future__ import annotations

import pytest

from lightning_lighthouse import LighthouseConfig


@pytest.mark.parametrize(
    ("setting", "error", "words"),
    [
        ({"num_levels": 1}, ValueError, ["num_levels", "at least 2", "1"]),
        ({"pooling_factor": 1}, ValueError, ["pooling_factor", "at least 2", "1"]),
        ({"top_k": 0}, ValueError, ["top_k", "at least 1", "0"]),
        ({"dilation": 0}, ValueError, ["dilation", "at least 1", "0"]),
        ({"seed": -1}, ValueError, ["seed", "at least 0", "-1"]),
        ({"max_documents": 0}, ValueError, ["max_documents", "at least 1", "0"]),
        ({"seed": 2**32}, ValueError, ["seed", "at most 4294967295", "4294967296"]),
        ({"selection": "top"}, ValueError, ["selection", "'published', 'causal', 'strided', 'random'", "'top'"]),
        ({"top_k": 1.5}, TypeError, ["top_k", "int or None", "1.5"]),
        ({"num_levels": True}, TypeError, ["num_levels", "int", "True"]),
        ({"cover_prefix": 1}, TypeError, ["cover_prefix", "bool", "1"]),
        ({"scorer": "nrom"}, ValueError, ["scorer", "'norm'", "'nrom'"]),
        ({"combine": "max"}, ValueError, ["combine", "'sum', 'mean'", "'max'"]),
        ({"backend": None}, ValueError, ["backend", "'triton'", "None"]),
        ({"sdpa": "fast"}, ValueError, ["sdpa", "'cudnn'", "'fast'"]),
    ],
)
def test_wrong_values_are_quoted(setting, error, words):
    with pytest.raises(error) as caught:
        LighthouseConfig(**setting)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("num_tokens", "top_k"),
    [(1, 32), (2_048, 32), (4_096, 64), (8_191, 127), (8_192, 128), (98_304, 1536), (99_999, 1536)],
)
def test_default_budget_is_one_token_in_64(num_tokens, top_k):
    assert LighthouseConfig().resolve_top_k(num_tokens) == top_k


# S of targets.md's published sizes: N / p^(L-1) + (L - 1) p k
@pytest.mark.parametrize(
    ("num_tokens", "levels", "p", "top_k", "gathered"),
    [
        (32_768, 3, 4, 1024, 10_240),
        (98_304, 3, 4, 1536, 18_432),
        (524_288, 3, 4, 4096, 65_536),
        (1_048_576, 4, 4, 4096, 65_536),
        (98_304, 5, 2, 2048, 22_528),
    ],
)
def test_gathered_length_of_the_published_sizes(num_tokens, levels, p, top_k, gathered):
    shape = LighthouseConfig(num_levels=levels, pooling_factor=p, top_k=top_k, selection="published").pyramid(
        num_tokens
    )
    assert shape.num_gathered == gathered
    assert shape.padded_tokens == num_tokens


def test_300_winners_are_two_tiles_of_150():
    shape = LighthouseConfig(top_k=300, selection="published").pyramid(100_000)
    assert (shape.num_tiles, shape.winners[1:]) == (2, (150, 150))


# tiles, winners and candidates of one; as many are gathered as by the published selection where 32 divides top_k
@pytest.mark.parametrize(
    ("num_tokens", "levels", "top_k", "tiles", "winners", "candidates"),
    [
        (98_304, 3, 1536, 48, 32, 128),
        (524_288, 3, 4096, 128, 32, 256),
        (1_048_576, 4, 4096, 128, 32, 128),
        (32_768, 3, 63, 1, 63, 2_048),
        (32_768, 3, 64, 2, 32, 1_024),
    ],
)
def test_causal_tiles_have_32_winners(num_tokens, levels, top_k, tiles, winners, candidates):
    shape = LighthouseConfig(num_levels=levels, top_k=top_k, selection="causal").pyramid(num_tokens)
    assert (shape.num_tiles, shape.winners[1], shape.tile_entries) == (tiles, winners, candidates)
    for selection in ("published", "strided", "random"):
        other = LighthouseConfig(num_levels=levels, top_k=top_k, selection=selection).pyramid(num_tokens)
        assert other.num_gathered == shape.num_gathered
        assert other.num_tiles == max(1, top_k // 128)


@pytest.mark.parametrize("top_k", [129, 300, 1000, 1535])
def test_causal_winners_are_at_most_one_a_tile_fewer(top_k):
    shape = LighthouseConfig(top_k=top_k, selection="causal").pyramid(98_304)
    assert 0 <= top_k - shape.num_tiles * shape.winners[1] < shape.num_tiles


def test_winners_never_exceed_the_candidates():
    shape = LighthouseConfig(num_levels=4, pooling_factor=2, top_k=100, selection="published").pyramid(23)
    # 3 coarsest entries, then their children, and so on down
    assert shape.winners == (0, 12, 6, 3)
    assert shape.padded_tokens == 24
    assert not shape.compresses


def test_more_entries_than_int32_can_number_are_refused():
    with pytest.raises(ValueError, match="choose fewer levels"):
        LighthouseConfig(num_levels=40, pooling_factor=2, selection="published").pyramid(1000)
