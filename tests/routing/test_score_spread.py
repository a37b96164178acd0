"""Models that normalise q and k are told that the norm scorer has nothing to rank, once, and others are not."""

from __future__ import annotations

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from all_lighthouse import all_lighthouse
from foreign import GPT
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from warned import own_warnings

from lightning_lighthouse import LighthouseConfig, patch_attention
from lightning_lighthouse.routing.score_spread import ScoreSpread, SpreadMeter, normalises

transformers = pytest.importorskip("transformers")

CONFIG = LighthouseConfig(3, 2, 8, selection="published")
TOKENS = 128
# cosines and sines of no rotation
ROTARY = torch.ones(1, TOKENS, 16), torch.zeros(1, TOKENS, 16)
WARNING = (
    "(coefficient of variation of the level-1 scores below 0.05): scorer='norm' ranks noise there; set "
    "scorer='dilated', or selection='strided', which needs no scores"
)


def make(family, head_dim=16, **settings):
    torch.manual_seed(42)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": head_dim}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=256, num_hidden_layers=2, intermediate_size=64, attn_implementation="sdpa", **sizes, **settings
    )
    return getattr(transformers, f"{family}ForCausalLM")(config)


def warned(model, config):
    """What is said after routed batches and the check that follows them."""
    tokens = torch.randint(256, (1, TOKENS), generator=torch.Generator().manual_seed(42))
    with own_warnings() as lines, patch_attention(model, config, dense_layers=[]) as patch:
        for _ in range(2):
            model(tokens)
            model(tokens)
            patch.check()
    return lines


@pytest.mark.parametrize("selection", ["published", "causal"])
def test_a_model_with_norms_of_q_and_k_is_warned_once(selection):
    config = LighthouseConfig(3, 2, 8, selection=selection)
    assert warned(make("Qwen3"), config) == [f"the norms of q and k hardly differ in 100% of 4 heads {WARNING}"]


@pytest.mark.parametrize("selection", ["published", "causal"])
def test_a_model_in_double_precision_is_warned_alike(selection):
    config = LighthouseConfig(3, 2, 8, selection=selection)
    assert warned(make("Qwen3").double(), config) == warned(make("Qwen3"), config)
    assert warned(make("Llama").double(), config) == []


def test_a_training_is_warned_once(tmp_path):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = make("Qwen3")

        def training_step(self, batch, batch_idx):
            return self.model(batch, labels=batch).loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    tokens = torch.randint(256, (3, TOKENS))
    trainer = pl.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
        callbacks=all_lighthouse(switch_at=2, attention=CONFIG, dense_layers=[]),
    )  # fmt: skip
    with own_warnings() as lines:
        trainer.fit(Module(), torch.utils.data.DataLoader(tokens))
    assert [line for line in lines if "norms of" in line] == [
        f"the norms of q and k hardly differ in 100% of 4 heads {WARNING}"
    ]


def test_selective_checkpointing_gives_the_gradients_of_none():
    """What the first pass alone computes may not shift what the recompute finds among the kept results."""

    def keep_norms(context, operator, *args, **settings):
        is_norm = operator is torch.ops.aten.linalg_vector_norm.default
        return CheckpointPolicy.MUST_SAVE if is_norm else CheckpointPolicy.PREFER_RECOMPUTE

    gradients = []
    for is_checkpointed in (False, True):
        attention = make("Qwen3").model.layers[0].self_attn
        # an odd number, which the windows that are measured do not cover
        x, rotary = (
            torch.randn(1, 127, 64, generator=torch.Generator().manual_seed(1)),
            (ROTARY[0][:, 1:], ROTARY[1][:, 1:]),
        )
        contexts = partial(create_selective_checkpoint_contexts, keep_norms)
        with patch_attention(attention, CONFIG, dense_layers=[]):
            if is_checkpointed:
                out, _ = checkpoint(attention, x, rotary, None, use_reentrant=False, context_fn=contexts)
            else:
                out, _ = attention(x, rotary, None)
            out.square().sum().backward()
        gradients.append([parameter.grad for parameter in attention.parameters()])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected)


# a fresh projection to 128 channels spreads by 0.04 only: that is no norm
@pytest.mark.parametrize("head_dim", [16, 128])
def test_a_model_without_such_norms_is_not_warned(head_dim):
    assert warned(make("Llama", head_dim), CONFIG) == []


@pytest.mark.parametrize("settings", [{"scorer": "dilated"}, {"selection": "strided"}, {"selection": "random"}])
def test_what_the_warning_offers_ends_it(settings):
    assert warned(make("Qwen3"), LighthouseConfig(3, 2, 8, **settings)) == []


def test_learnt_scales_that_spread_the_norms_end_it():
    model = make("Qwen3")
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.data[:] = 0.1
            parameter.data[0] = 3.0
    assert warned(model, CONFIG) == []


def test_a_layer_is_flat_where_q_and_k_are_and_a_majority_counts():
    class Attention(nn.Module):
        def __init__(self, flat):
            super().__init__()
            self.project = nn.Linear(8, 24)
            self.flat = flat

        def forward(self, x):
            q, k, v = self.project(x).unflatten(-1, (3, 1, 8)).unbind(2)
            q = F.normalize(q, dim=-1) if "q" in self.flat else q
            k = F.normalize(k, dim=-1) if "k" in self.flat else k
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    def said_of(*layers):
        model = nn.Sequential(*(Attention(flat) for flat in layers))
        with own_warnings() as lines, patch_attention(model, CONFIG, dense_layers=[]) as patch:
            model(torch.randn(2, TOKENS, 8, generator=torch.Generator().manual_seed(42)))
            patch.check()
        return lines

    assert said_of("q k", "", "") == []
    assert said_of("q", "k", "q") == []
    assert said_of("q k", "q k", "") == [f"the norms of q and k hardly differ in 67% of 6 heads {WARNING}"]


def test_a_compiled_layer_is_judged_by_its_modules():
    x = torch.randn(1, TOKENS, 64)
    lines = {}
    for family in ("Qwen3", "Llama"):
        torch.compiler.reset()
        attention = make(family).model.layers[0].self_attn
        with own_warnings() as lines[family], patch_attention(attention, CONFIG, dense_layers=[]) as patch:
            torch.compile(attention, backend="eager")(x, ROTARY, None)
            patch.check()
    assert lines["Llama"] == []
    assert lines["Qwen3"] == [
        "1 of 1 layers normalise q and k (the module itself, ...), so that their norms may hardly differ; compiled "
        "or transformed, they were not measured. Then scorer='norm' ranks noise there; set scorer='dilated', or "
        "selection='strided', which needs no scores"
    ]


def test_gradients_of_each_sample_are_taken_and_nothing_is_measured():
    torch.manual_seed(0)
    model = GPT(layers=2)
    weights = dict(model.named_parameters())
    tokens = torch.randint(31, (3, TOKENS), generator=torch.Generator().manual_seed(42))

    def loss(weights, sample):
        return torch.func.functional_call(model, weights, sample[None]).square().mean()

    one = torch.func.grad(loss)
    with patch_attention(model, CONFIG, dense_layers=[]) as patch:
        patch.scope.spread = SpreadMeter()
        found = torch.func.vmap(one, (None, 0))(weights, tokens)
        patch.check()
        assert patch.scope.spread.mean() is None
        each = [one(weights, sample) for sample in tokens]
    assert not patch.is_patched
    for name in weights:
        torch.testing.assert_close(found[name], torch.stack([gradients[name] for gradients in each]))


def test_a_model_is_restored_where_its_check_fails(monkeypatch):
    model = GPT(layers=1)
    patch = patch_attention(model, CONFIG, dense_layers=[]).__enter__()
    model(torch.zeros(1, TOKENS, dtype=torch.long))
    monkeypatch.setattr(ScoreSpread, "warning", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        patch.__exit__(None, None, None)
    assert not patch.is_patched


@pytest.mark.slow
def test_a_compiled_layer_is_not_compiled_anew_when_the_measuring_ends():
    graphs = []

    def count(module, inputs):
        graphs.append([str(node.target) for node in module.graph.nodes])
        return module.forward

    torch.compiler.reset()
    attention = make("Qwen3").model.layers[0].self_attn
    x = torch.randn(1, TOKENS, 64)
    with patch_attention(attention, CONFIG, dense_layers=[]) as patch:
        compiled = torch.compile(attention, backend=count)
        compiled(x, ROTARY, None)
        num_graphs = len(graphs)
        assert num_graphs > 0
        patch.check()
        assert patch.scope.audit is None
        compiled(x, ROTARY, None)
    assert len(graphs) == num_graphs
    assert not any("std" in target for targets in graphs for target in targets)


def test_a_norm_over_all_heads_is_none_of_a_head():
    attention = make("Qwen3").model.layers[0].self_attn
    assert normalises(attention, 16)
    assert normalises(attention, None)
    together = make("Olmo2").model.layers[0].self_attn
    assert not normalises(together, 16)
    assert not normalises(make("Llama").model.layers[0].self_attn, 16)
