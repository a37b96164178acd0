"""Slices of batches put together again, of every form, and the mark that other batches do not have."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_lighthouse.attention.documents import Documents
from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.context.group import Context, current, entered, local_positions, whole_sequences
from lightning_lighthouse.context.slices import mark_of, num_inputs, shorten, slice_batch, slice_tokens

RANKS, LOCAL = 3, 7
TOKENS = RANKS * LOCAL
CONTEXTS = [Context(rank, RANKS, "no group") for rank in range(RANKS)]


def test_positions_are_cut_by_their_last_dimension():
    whole = torch.arange(TOKENS)
    axes = torch.stack([whole.expand(2, -1)] * 3)
    batch = {"input_ids": drawn(2, TOKENS), "position_ids": axes, "cache_position": whole}
    parts = [slice_batch(batch, context) for context in CONTEXTS]
    for name in ("position_ids", "cache_position"):
        assert torch.equal(torch.cat([part[name] for part in parts], -1), batch[name])
    assert torch.equal(shorten(batch, 5)["cache_position"], whole[:5])


def drawn(*shape: int) -> torch.Tensor:
    return torch.randint(100, shape, generator=torch.Generator().manual_seed(42))


def test_inputs_and_targets_of_the_slices_are_those_of_the_whole():
    tokens = drawn(2, TOKENS + 1)
    batch = {
        "tokens": tokens,
        "positions": drawn(2, TOKENS + 1),
        "weight": torch.ones(2),
        "documents": Documents([[22]]),
    }
    parts = [slice_batch(batch, context) for context in CONTEXTS]
    assert torch.equal(torch.cat([part["tokens"][:, :-1] for part in parts], 1), tokens[:, :-1])
    assert torch.equal(torch.cat([part["tokens"][:, 1:] for part in parts], 1), tokens[:, 1:])
    assert all(part["positions"].shape == (2, LOCAL + 1) and part["weight"] is batch["weight"] for part in parts)
    # what says of whole sequences where documents lie is not handed on
    assert all(set(part) == {"tokens", "positions", "weight"} for part in parts)
    for context, part in zip(CONTEXTS, parts, strict=True):
        assert torch.equal(slice_batch(tokens, context), part["tokens"])
        with entered(context):
            assert torch.equal(slice_tokens(tokens), part["tokens"])
    assert slice_tokens(tokens) is tokens


def test_the_mean_over_ranks_of_a_transformers_loss_is_that_of_the_whole():
    ids, logits = drawn(2, TOKENS), torch.randn(2, TOKENS, 100, dtype=torch.float64)
    # the last rank has few targets, and no edge of a rank loses one
    labels = ids.masked_fill(torch.arange(TOKENS) > 16, -100)
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    losses = []
    for context in CONTEXTS:
        part = slice_batch({"input_ids": ids, "labels": labels}, context)
        here = slice(context.rank * LOCAL, (context.rank + 1) * LOCAL)
        assert torch.equal(part["input_ids"], ids[:, here])
        assert torch.equal(part["labels"], labels[:, here])
        assert torch.equal(part["position_ids"], torch.arange(TOKENS)[here].expand(2, -1))
        total = F.cross_entropy(logits[:, here].flatten(0, 1), part["shift_labels"].view(-1), reduction="sum")
        losses.append(total / part["num_items_in_batch"])
    assert torch.stack(losses).mean().item() == pytest.approx(wanted.item(), rel=1e-14)


def test_given_positions_and_shifted_labels_are_cut_and_kept():
    given = {"input_ids": drawn(1, TOKENS), "position_ids": drawn(1, TOKENS), "shift_labels": drawn(1, TOKENS)}
    part = slice_batch({**given, "labels": given["input_ids"]}, CONTEXTS[1])
    assert set(part) == {*given, "labels"}
    assert all(torch.equal(part[name], value[:, LOCAL : 2 * LOCAL]) for name, value in given.items())


@pytest.mark.parametrize(("form", "tokens"), [("tokens", 21), ("input_ids", 22), ("alone", 21)])
def test_the_first_tokens_of_a_batch(form, tokens):
    ids = drawn(2, 22)
    batch = ids if form == "alone" else {form: ids, "other": ids, "documents": Documents([[22], [22]])}
    assert num_inputs(batch) == tokens
    short = shorten(batch, 4)
    assert num_inputs(short) == 4
    if form != "alone":
        assert set(short) == {form, "other"}
        assert short["other"].shape == short[form].shape


@pytest.mark.parametrize("batch", [[torch.ones(2, 3)], {"x": torch.ones(2, 3)}, torch.ones(2, 3), torch.ones(4).int()])
def test_other_forms_are_not_known(batch):
    assert num_inputs(batch) is None


@pytest.mark.parametrize(("total", "shown"), [(1022, "1,022"), (0, "0")])
def test_tokens_that_cannot_be_shared(total, shown):
    line = f"{shown} tokens cannot be shared by 3 ranks; choose seq_len a multiple of 3"
    with pytest.raises(SettingError, match=line):
        slice_batch({"tokens": drawn(1, total + 1)}, CONTEXTS[0])


def test_a_mark_differs_for_other_numbers_and_other_orders():
    device = torch.device("cpu")
    tokens = drawn(2, 50)
    batch = {"tokens": tokens, "scale": torch.rand(2)}
    same = {"tokens": tokens.clone(), "scale": torch.rand(2)}
    assert torch.equal(mark_of(batch, device), mark_of(same, device))
    swapped = tokens.flip(0)
    longer = torch.cat((tokens, torch.zeros(2, 1, dtype=torch.int64)), 1)
    changed = tokens.clone()
    changed[1, -1] += 1
    marks = [int(mark_of(other, device)) for other in (tokens, swapped, longer, changed, [tokens, tokens], "text")]
    assert len(set(marks)) == len(marks)


def test_positions_begin_where_the_rank_does():
    assert local_positions(4).tolist() == [0, 1, 2, 3]
    with entered(CONTEXTS[2]):
        assert local_positions(4).tolist() == [8, 9, 10, 11]
        with whole_sequences():
            assert current() is None
            assert local_positions(2).tolist() == [0, 1]
        assert current() is CONTEXTS[2]
    assert current() is None
