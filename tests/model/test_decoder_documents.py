"""The decoder with documents: where they lie, positions that restart, whole runs with the recipe, resume, ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from all_lighthouse import all_lighthouse
from documents_run import CONFIG, LENGTHS, Batches, decoder, rows, train
from places import HELPERS

from lightning_lighthouse import Documents, FutureLeakProbe, LighthouseCallback, LighthouseRecipe, patch_attention
from lightning_lighthouse.data.preparing.prepare import prepare
from lightning_lighthouse.routing.packing import PackedBatchError
from lightning_lighthouse.routing.scope import scopes

SEQ_LEN = 96
# of the tokens that are read: the last target is cut off
READ = [[*row[:-1], row[-1] - 1] for row in LENGTHS]


def batch(names=("documents",), targets=1):
    documents = Documents(LENGTHS)
    drawn = {
        "documents": documents,
        "document_ids": documents.document_ids("cpu"),
        "positions": documents.position_ids("cpu"),
    }
    return {"tokens": torch.stack(rows()), **{name: drawn[name] for name in names}}


def test_the_last_token_is_a_target_alone():
    model = decoder()
    for names in (["documents"], ["document_ids"]):
        assert model.documents(batch(names)) == Documents(READ)
    # given for the tokens that are read
    assert model.documents({**batch([]), "document_ids": Documents(READ).document_ids("cpu")}) == Documents(READ)
    assert model.documents(batch([])) is None
    assert model.documents(torch.stack(rows())) is None


def one_by_one(model):
    parts = []
    for tokens, lengths in zip(rows(), READ, strict=True):
        hidden = torch.cat([model.hidden(part[None]) for part in tokens[:-1].split(lengths)], 1)
        parts.append(model.head(hidden[0], tokens[1:]))
    return torch.stack(parts).sum() / (2 * (len(rows()[0]) - 1))


@pytest.mark.parametrize("checkpoint", ["none", "block"])
@pytest.mark.parametrize("names", [["documents"], ["document_ids"], ["documents", "positions"]], ids="+".join)
def test_a_step_equals_the_documents_one_by_one(names, checkpoint):
    model = decoder(restart_positions=True, checkpoint=checkpoint)
    given = batch(names)
    with patch_attention(model, CONFIG, documents=True) as patch:
        patch.dense()
        patch.set_documents(model.documents(given))
        loss = model.loss(given)
        loss.backward()
        inputs, targets = given["tokens"][:, :-1], given["tokens"][:, 1:]
        torch.testing.assert_close(model.token_losses(inputs, targets).mean(), loss)
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    expected = one_by_one(model)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for one, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-6, atol=1e-9)


def test_positions_restart_only_where_they_are_told_to():
    one, other = decoder(), decoder(restart_positions=True)
    tokens = batch([])
    with pytest.raises(ValueError, match="restart_positions=True, but the batch holds no documents"):
        other.loss(tokens)
    assert torch.equal(one(tokens["tokens"]), other(tokens["tokens"]))
    losses = []
    for model in (one, other):
        with patch_attention(model, CONFIG, documents="ignore") as patch:
            patch.dense()
            losses.append(model.loss(batch()))
    assert losses[0] != losses[1]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 150, (120,), generator=generator).tolist()
    text = [{"text": "".join(chr(97 + (i * n) % 26) for i in range(n))} for n in lengths]
    (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in text))
    prepare(str(folder / "prepared"), seq_len=SEQ_LEN, source=str(folder / "text.jsonl"), validation_fraction=0.2)
    return str(folder / "prepared")


def recipe(prepared, **options):
    return LighthouseRecipe(source=prepared, seq_len=SEQ_LEN, batch_size=2, num_workers=0, **options)


def lighthouse(**options):
    return all_lighthouse(4, CONFIG, **{"documents": True, **options})


def test_a_run_with_the_recipe_resumes_in_the_middle_as_if_unbroken(prepared, tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    def run(callbacks, **settings):
        model = decoder(restart_positions=True, vocab_size=257)
        return train(model, recipe(prepared, document_ids=True), [lighthouse(), *callbacks], tmp_path, **settings)

    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    unbroken = run([saving], enable_checkpointing=True)
    for step in (3, 5):
        resumed = run([], ckpt_path=tmp_path / f"step={step}.ckpt")
        assert all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True))
    assert scopes == []


def test_the_recipe_and_the_callback_must_both_know_of_documents(prepared, tmp_path):
    model = decoder(vocab_size=257)
    with pytest.raises(ValueError, match="as LighthouseRecipe does with document_ids=True"):
        train(model, recipe(prepared), [lighthouse()], tmp_path)
    with pytest.raises(PackedBatchError):
        train(model, recipe(prepared, document_ids=True), [lighthouse(documents=False)], tmp_path)


@pytest.mark.parametrize("selection", ["causal", pytest.param("published", marks=pytest.mark.slow)])
def test_a_probe_replaces_text_and_leaves_the_documents(prepared, tmp_path, selection):
    seen = []

    class Watched(type(decoder())):
        def token_losses(self, inputs, targets):
            (scope,) = scopes
            assert scope.documents.num_tokens == inputs.shape[1]
            seen.append((scope.is_on, str(scope.documents.lengths)))
            return super().token_losses(inputs, targets)

    model = decoder(Watched, restart_positions=True, vocab_size=257)
    config = CONFIG if selection == "causal" else type(CONFIG)(2, 2, 8, selection="published")
    probe = FutureLeakProbe(num_batches=2, many_positions=False)
    callback = all_lighthouse(4, config, documents=True)
    train(model, recipe(prepared, document_ids=True), [callback, probe], tmp_path, max_steps=4)
    assert [result.step for result in probe.results] == [2, 4]
    # dense and routed, in the documents of both batches
    assert {on for on, _ in seen} == {True, False}
    assert len({lengths for _, lengths in seen}) == 2
    for result in probe.results:
        if selection == "causal":
            assert (result.leak_nats, result.leak_stderr) == (0.0, 0.0)
    plain = decoder(restart_positions=True, vocab_size=257)
    train(
        plain,
        recipe(prepared, document_ids=True),
        [all_lighthouse(4, config, documents=True)],
        tmp_path,
        max_steps=4,
    )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.slow
def test_two_ranks_with_other_documents_train_as_one(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(HELPERS / "documents_run.py"), str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    from documents_run import main

    main(tmp_path / "alone")
    alone = torch.load(tmp_path / "alone" / "rank0.pt")
    for rank in range(2):
        for name, value in torch.load(tmp_path / f"rank{rank}.pt").items():
            torch.testing.assert_close(value, alone[name], rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("layer_types", [["lighthouse"], ["window", "lighthouse"]], ids="+".join)
def test_a_compiled_decoder_trains_as_one_that_is_not(tmp_path, layer_types):
    window = 7 if "window" in layer_types else None
    found = []
    for compile in (False, True):
        model = decoder(restart_positions=True, compile=compile).float()
        callback = LighthouseCallback(4, CONFIG, documents=True, layer_types=layer_types, window=window)
        data = torch.utils.data.DataLoader(Batches([0, 1]), batch_size=None)
        train(model, data, [callback], tmp_path, val_check_interval=None)
        found.append([parameter.detach() for parameter in model.parameters()])
    torch._dynamo.reset()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
