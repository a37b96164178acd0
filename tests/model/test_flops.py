"""FLOPs of a step against torch's own count, pairs by type of layer, parameters that are used, peaks of cards."""

from __future__ import annotations

import pytest
import torch
from foreign import GPT, VOCABULARY, GroupedGPT
from places import DOCS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_lighthouse import Documents, LighthouseConfig
from lightning_lighthouse.model import Decoder
from lightning_lighthouse.model.flops import (
    AttentionSize,
    attention_flops_per_token,
    attention_size,
    num_used_parameters,
    pairs_inside,
    pairs_per_token,
    train_flops_per_token,
)
from lightning_lighthouse.model.peaks import PEAKS, peak_flops
from lightning_lighthouse.routing.targets import find_targets


def test_the_parameters_are_what_torch_counts_six_times_a_token():
    torch.manual_seed(0)
    model = GPT(layers=2, dim=24, heads=2, tokens=37)
    tokens = torch.randint(VOCABULARY, (3, 37))
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    counted = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    products = sum(count for name, count in counted.items() if "attention" not in name)
    matrices = sum(parameter.numel() for name, parameter in model.named_parameters() if parameter.ndim == 2)
    matrices -= model.embed.weight.numel() + model.position.weight.numel()
    assert products == 6 * matrices * tokens.numel()
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    assert num_used_parameters(model) == matrices + vectors


def test_a_table_that_the_head_shares_is_used():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(31, 7), nn.Linear(7, 31, bias=False)
            self.head.weight = self.embedding.weight

    assert num_used_parameters(Tied()) == 31 * 7
    assert num_used_parameters(nn.Embedding(31, 7)) == 0


def test_of_experts_those_count_that_a_token_is_sent_to():
    class Config:
        num_experts_per_tok, num_experts = 2, 8

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = Config()
            self.gate = nn.Linear(5, 8, bias=False)
            self.experts = nn.ModuleList(nn.Linear(5, 5, bias=False) for _ in range(8))

    assert num_used_parameters(Mixture()) == 5 * 8 + 2 * 5 * 5


def test_dense_attention_is_twelve_layers_heads_widths_and_tokens():
    # the usual 12 L H Q T, beside 6 parameters
    layers, heads, width, tokens = 3, 5, 7, 1013
    sizes = [AttentionSize(heads * width, heads * width)] * layers
    pairs = [pairs_per_token("dense", tokens)] * layers
    assert train_flops_per_token(1000, sizes, pairs) == 6 * 1000 + 12 * layers * heads * width * tokens
    # a value may be as wide as it likes, and a layer may have a window of its own
    assert train_flops_per_token(0, [AttentionSize(10, 4, own_window=100)], [1013.0]) == 6 * 14 * 100


@pytest.mark.parametrize(
    ("layer_type", "settings", "expected"),
    [
        ("dense", {}, 98_304),
        ("window", {"window": 512}, 512),
        ("window", {"window": 512, "sink_tokens": 4}, 516),
        ("window", {"window": 200_000}, 98_304),
        ("chunk", {"window": 4096, "sink_tokens": 4}, 4096),
        # S = 18,432 of the published settings
        ("lighthouse", {"config": LighthouseConfig(selection="published")}, 18_432**2 / 98_304),
    ],
)
def test_pairs_by_type(layer_type, settings, expected):
    assert pairs_per_token(layer_type, 98_304, **settings) == expected


def test_a_pyramid_that_gains_nothing_is_dense():
    assert pairs_per_token("lighthouse", 64, LighthouseConfig()) == 64


def test_pairs_inside_documents_are_those_of_each():
    documents = Documents([[100, 28], [128]])
    assert pairs_inside("dense", documents) == (100**2 + 28**2 + 128**2) / 256
    assert pairs_inside("window", documents, window=40, sink_tokens=2) == (100 * 42 + 28 * 28 + 128 * 42) / 256
    config = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=8, selection="published")
    # one document a sequence is the sequence
    whole = Documents([[128], [128]])
    assert pairs_inside("lighthouse", whole, config) == pairs_per_token("lighthouse", 128, config)
    assert pairs_inside("lighthouse", documents, config) < pairs_inside("lighthouse", whole, config)
    # too many to keep memory for run dense
    crowded = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=8, max_documents=1)
    assert pairs_inside("lighthouse", documents, crowded) == documents.attended_length


@pytest.mark.parametrize("model", [GPT(2, 24, 2), GroupedGPT(2)], ids=["linear", "attributes"])
def test_sizes_of_foreign_layers(model):
    sizes = [attention_size(layer) for layer in find_targets(model).values()]
    assert sizes == [AttentionSize(24, 24)] * 2


def test_sizes_of_our_decoder_and_of_multihead_attention():
    model = Decoder("toy", num_kv_heads=2)
    assert {attention_size(layer) for layer in find_targets(model).values()} == {AttentionSize(128, 128)}
    assert attention_size(nn.MultiheadAttention(12, 3)) == AttentionSize(12, 12)
    assert attention_size(nn.Identity()) is None
    # a block that attends by itself, and one whose heads are not as wide as the model
    assert attention_size(nn.Sequential(nn.Linear(8, 24), nn.Linear(8, 32), nn.Linear(32, 8))) == AttentionSize(8, 8)
    assert attention_size(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))) is None


def test_sizes_of_transformers_layers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.Qwen3Config(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_hidden_layers=1,
        intermediate_size=48,
        vocab_size=50,
    )
    model = transformers.Qwen3ForCausalLM(config)
    assert [attention_size(layer) for layer in find_targets(model).values()] == [AttentionSize(64, 64)]


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989.5),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
        # others, though their names begin so
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce GTX 1080", None),
        ("cpu", None),
    ],
)
def test_peaks(name, tera):
    assert peak_flops(name) == (None if tera is None else tera * 1e12)


def test_every_peak_says_where_it_is_from():
    assert all(source for _, _, source in PEAKS)


# docs/use/curves.md, from tokens/s measured on an H100
@pytest.mark.parametrize(
    ("preset", "num_tokens", "kind", "top_k", "tokens_per_second", "mfu"),
    [
        ("small", 262_144, "lighthouse", None, 669_269, 0.63),
        ("small", 262_144, "dense", None, 45_961, 0.91),
        ("paper", 98_304, "lighthouse", 1536, 191_626, 0.56),
        ("paper", 32_768, "dense", None, 59_687, 0.83),
    ],
)
def test_the_page_has_the_mfu_of_measured_speeds(preset, num_tokens, kind, top_k, tokens_per_second, mfu):
    with torch.device("meta"):
        model = Decoder(preset=preset)
    layers = list(find_targets(model).values())
    sizes = [attention_size(layer) for layer in layers]
    pairs = [pairs_per_token(kind, num_tokens, LighthouseConfig(top_k=top_k), None, 0) for _ in layers]
    flops = 6 * num_used_parameters(model) + attention_flops_per_token(sizes, pairs)
    found = flops * tokens_per_second / peak_flops("NVIDIA H100 80GB HBM3")
    assert found == pytest.approx(mfu, abs=0.006)
    row = f"{kind.replace('lighthouse', 'Lighthouse')} | {tokens_per_second:,} | {mfu} |"
    assert row in (DOCS / "use" / "curves.md").read_text()
