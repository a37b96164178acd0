"""The text of a batch, the losses of single tokens, and the two versions of a text that a trial compares."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from foreign import GPT, Sequences
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lighthouse.evaluation.leak import PART_WINDOWS, Sample, draw_positions, draw_trial, other_text
from lightning_lighthouse.evaluation.text import Text, read_text, token_losses
from lightning_lighthouse.model import Decoder


def make_text(batch: int, num_tokens: int, first: int = 0) -> Text:
    """Every token has its own number, so that it tells where it is from."""
    tokens = first + torch.arange(batch * (num_tokens + 1)).view(batch, -1)
    return Text(tokens[:, :-1], tokens[:, 1:], num_tokens)


@given(
    batch=st.integers(1, 3),
    num_tokens=st.integers(3, 700),
    window=st.sampled_from([2, 4, 9, 16]),
    many=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=120, deadline=None)
def test_a_trial_replaces_the_future_of_its_positions_and_nothing_else(batch, num_tokens, window, many, seed):
    generator = torch.Generator().manual_seed(seed)
    text, other = make_text(batch, num_tokens), make_text(batch, num_tokens, first=10**6).inputs
    drawn, part = draw_positions(text, window, generator, many)
    parts = drawn.shape[2]
    assert parts == (max(1, num_tokens // (PART_WINDOWS * window)) if many else 1)
    assert parts * part <= num_tokens
    # in windows, each at most once, one in each part, with a true next token to predict
    assert all(len(set(column.tolist())) == len(column) for column in drawn.flatten(1).T)
    assert bool((drawn.div(part, rounding_mode="floor") == torch.arange(parts)).all())
    assert int(drawn.max()) + 1 < num_tokens
    if window < num_tokens:
        assert bool(((drawn + 1) % window > 0).all())
    if parts > 1:
        # clean text before the position, at least a window of other text after it
        assert int((drawn % part).min()) >= part - part // 4
        assert int((drawn % part).max()) < part - window

    trial = draw_trial(text, other, drawn[-1], part, generator)
    is_other = [version == other for version in trial.versions]
    assert all(
        bool((x == torch.where(o, other, text.inputs)).all()) for x, o in zip(trial.versions, is_other, strict=True)
    )
    assert not bool((is_other[0] & is_other[1]).any())
    for row in range(batch):
        expected = torch.zeros(num_tokens, dtype=torch.bool)
        for p, j in enumerate(trial.positions[row].tolist()):
            end = (p + 1) * part
            expected[j + 1 : end] = True
            replaced, true = is_other if trial.is_replaced[row, p] else is_other[::-1]
            assert bool(replaced[row, j + 1 : end].all())
            assert not bool(true[row, p * part : end].any())
        assert torch.equal(is_other[0][row] | is_other[1][row], expected)


def test_a_sequence_of_one_part_is_replaced_to_its_end_and_tested_everywhere():
    text = make_text(2, 24)
    drawn, part = draw_positions(text, 4, torch.Generator().manual_seed(0), many=False)
    assert part == 24
    assert drawn[:, 0, 0].sort().values.tolist() == [j for j in range(23) if j % 4 != 3]


def test_differences_have_the_sign_of_a_loss_that_rises_with_the_future_replaced():
    text = make_text(3, 96)
    generator = torch.Generator().manual_seed(0)
    drawn, part = draw_positions(text, 2, generator)
    trial = draw_trial(text, make_text(3, 96, first=10**6).inputs, drawn[0], part, generator)
    assert {False, True} <= set(trial.is_replaced.flatten().tolist())
    # a reader of the next token: its loss is 1 where that was replaced
    losses = [(version.roll(-1, dims=1) != text.targets).float() for version in trial.versions]
    assert torch.equal(trial.differences(*losses), torch.ones(trial.positions.shape))


def test_other_text_is_of_another_sequence():
    texts = [make_text(2, 10, first=100 * n) for n in range(3)]
    rows = torch.cat([text.inputs for text in texts])
    seen = set()
    for shift in range(7):
        for index, text in enumerate(texts):
            other = other_text(texts, index, shift)
            assert not bool((other == text.inputs).any())
            seen |= {(tuple(own.tolist()), tuple(row.tolist())) for own, row in zip(text.inputs, other, strict=True)}
    # every sequence met every other
    assert len(seen) == len(rows) * (len(rows) - 1)


def test_other_text_may_be_longer_and_a_lone_sequence_is_turned():
    short, long = make_text(1, 4), make_text(1, 9, first=50)
    assert other_text([short, long], 0, 0).tolist() == [[50, 51, 52, 53]]
    assert other_text([short], 0, 0).tolist() == [[2, 3, 0, 1]]


TOKENS = Sequences(2).tokens


def test_batches_are_read_as_models_read_them():
    for batch in (TOKENS, {"tokens": TOKENS, "positions": TOKENS}):
        text = read_text(batch)
        assert torch.equal(text.inputs, TOKENS[:, :-1])
        assert torch.equal(text.targets, TOKENS[:, 1:])
        assert text.num_targets == TOKENS.shape[1] - 1
    # also one that numbers segments
    for mask in (torch.ones_like(TOKENS), torch.arange(1, TOKENS.shape[1] + 1).expand_as(TOKENS)):
        ids = read_text({"input_ids": TOKENS, "labels": TOKENS, "attention_mask": mask})
    assert torch.equal(ids.inputs, TOKENS)
    assert torch.equal(ids.targets[:, : ids.num_targets], TOKENS[:, 1:])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"text": "a"}, "alone or in a mapping as 'tokens' or 'input_ids', got a mapping of 'text'"),
        (torch.zeros(2, 9), r"got torch.float32 \[2, 9\]"),
        (TOKENS[:, :2], r"at least 3 tokens\].*got torch.int64 \[2, 2\]"),
        ([TOKENS], "got list"),
        ({"input_ids": TOKENS, "attention_mask": TOKENS * 0}, "without padding, got an attention_mask with zeros"),
    ],
)
def test_other_batches_are_refused(batch, message):
    with pytest.raises((TypeError, ValueError), match=message):
        read_text(batch)


def test_the_losses_of_tokens_come_from_a_method_or_from_logits():
    torch.manual_seed(0)
    decoder, text = (
        Decoder(num_layers=1, dim=16, num_heads=2, ffn_dim=24, vocab_size=31, loss_chunk=50),
        read_text(TOKENS),
    )
    losses = token_losses(decoder, text.inputs, text.targets)
    assert losses.shape == text.targets.shape
    assert losses.mean().item() == pytest.approx(decoder.loss(TOKENS).item(), rel=1e-6)

    class WithLogits(nn.Module):
        def forward(self, inputs):
            return SimpleNamespace(logits=decoder(inputs))

    class Plain(nn.Module):
        forward = staticmethod(decoder.forward)

    for module in (WithLogits(), Plain()):
        torch.testing.assert_close(token_losses(module, text.inputs, text.targets), losses)


def test_a_module_that_offers_no_losses_is_told_what_is_missing():
    text = read_text(TOKENS)

    class Scalar(nn.Module):
        def forward(self, inputs):
            return {"loss": inputs.float().mean()}

    with pytest.raises(TypeError, match=r"give Scalar a method token_losses\(inputs, targets\).*returned dict$"):
        token_losses(Scalar(), text.inputs, text.targets)

    class Mean(GPT):
        def token_losses(self, inputs, targets):
            return torch.zeros(())

    with pytest.raises(TypeError, match=r"Mean.token_losses must return one loss for each target, \[2, 128\], got a t"):
        token_losses(Mean(), text.inputs, text.targets)


def test_the_standard_error_is_that_of_the_mean():
    values = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3
    sample = Sample()
    for part in values.split(17):
        sample.add(len(part), part.sum().item(), part.square().sum().item())
    assert sample.count == 50
    assert sample.mean == pytest.approx(values.mean().item())
    assert sample.stderr == pytest.approx(values.std().item() / 50**0.5)
    assert str(Sample(1, 2.0, 4.0).stderr) == str(Sample(2, float("nan"), 1.0).stderr) == "nan"
