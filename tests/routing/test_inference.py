"""Prompts, generation and validation stay dense while a patch is on."""

from __future__ import annotations

import pytest
import torch
from families import CONFIG, GROUPED, build_transformers
from foreign import GPT, VOCABULARY
from patching import CheckpointedBlocks
from torch.utils.checkpoint import checkpoint

from lightning_lighthouse import patch_attention


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


def tokens(length=67, seed=0):
    return torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))


def llama():
    return build_transformers("LlamaConfig", **GROUPED).model


def generate(model):
    # a mask of ones: else it is guessed from the tokens
    settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    return model.generate(tokens(), attention_mask=torch.ones_like(tokens()), max_new_tokens=5, **settings)


def same(one, other):
    assert len(one.logits) == len(other.logits) == 5
    return torch.equal(one.sequences, other.sequences) and all(map(torch.equal, one.logits, other.logits))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_generate_is_dense_while_on(training, compiled):
    model = llama().train(training)
    dense = generate(model)
    own = model.generate
    run = torch.compile(model, backend="eager") if compiled else model
    patch = patch_attention(model, CONFIG)
    patch.on(inference=True)
    assert same(generate(run), dense)
    assert patch.is_on
    # a training batch before and after is routed
    routed = model(tokens()).logits
    with patch.paused():
        plain = model(tokens()).logits
    assert not torch.allclose(routed, plain, atol=1e-3)
    patch.restore()
    assert "generate" not in vars(model)
    assert model.generate == own


def test_generate_is_dense_under_two_patches_until_the_last_is_gone():
    model = llama().eval()
    dense = generate(model)
    patches = [patch_attention(model, CONFIG, select=f"*.layers.{i}.self_attn", dense_layers=[]) for i in (1, 2)]
    for patch in patches:
        patch.on(inference=True)
    for patch in patches:
        assert same(generate(model), dense)
        assert "generate" in vars(model)
        patch.restore()
    assert "generate" not in vars(model)
    assert same(generate(model), dense)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_prompt_by_hand_and_its_next_tokens_are_dense_while_on(mode):
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    model = llama().eval()

    def steps():
        cache = transformers.DynamicCache(config=model.config)
        outputs = [model(tokens(), past_key_values=cache).logits]
        for step in range(2):
            outputs.append(model(tokens(1, seed=step), past_key_values=cache).logits)
        return outputs

    with mode():
        dense = steps()
        with patch_attention(model, CONFIG) as patch:
            assert all(map(torch.equal, steps(), dense))
            patch.unrouted()
            patch.on(inference=True)
            assert not torch.allclose(steps()[0], dense[0], atol=1e-3)


class Reentrant(GPT):
    def forward(self, x):
        x = self.embed(x) + self.position(torch.arange(x.shape[1]))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True)
        return self.head(x)


def test_a_frozen_backbone_in_eval_mode_is_routed_also_under_a_reentrant_checkpoint():
    # its first forward runs without gradients, as a prompt does, and its second one with
    torch.manual_seed(0)
    model = GPT().eval()

    def gradients():
        model.zero_grad()
        model(tokens(96)).square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    with patch_attention(model, CONFIG):
        expected = gradients()
    model.__class__ = Reentrant
    with patch_attention(model, CONFIG) as patch:
        found = gradients()
        patch.check()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["eval", "train", "not reentrant", "dense"])
def test_frozen_attention_behind_trained_weights_of_a_checkpoint_is_one_kind_both_times_or_an_error(mode):
    # in its first forward nothing shows that gradients go through such a layer
    torch.manual_seed(0)
    model = GPT().train(mode == "train")
    for block in model.blocks:
        block.attn.requires_grad_(False)

    def gradients():
        model.zero_grad()
        model(tokens(96)).square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    def step():
        with patch_attention(model, CONFIG) as patch:
            if mode == "dense":
                patch.dense()
            return gradients()

    expected = step()
    model.__class__ = CheckpointedBlocks
    model.use_reentrant = mode != "not reentrant"
    if mode == "eval":
        with pytest.raises(RuntimeError, match=r"^blocks\.3\.attn is frozen and in eval mode, .* use_reentrant=False$"):
            step()
        assert not any(name.startswith("_lighthouse") for module in model.modules() for name in vars(module))
        return
    for one, other in zip(step(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_layers_that_are_unfrozen_in_eval_mode_are_routed_from_then_on():
    # nothing before them is trained: their first forwards have no second one until then
    torch.manual_seed(0)
    model = GPT().eval()
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    model.__class__ = CheckpointedBlocks
    model.use_reentrant = True

    def step():
        model.zero_grad()
        model(tokens(96)).square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    with patch_attention(model, CONFIG) as patch:
        step()
        # dense for want of gradients, and told
        assert len(patch.unrouted()) == 4
        model.requires_grad_(True)
        found = step()
    model.use_reentrant = False
    with patch_attention(model, CONFIG):
        expected = step()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_restored_patch_stays_restored_after_a_pause():
    model = GPT()
    patch = patch_attention(model, CONFIG)
    patch.on()
    with patch.paused():
        patch.restore()
    assert not patch.is_on
