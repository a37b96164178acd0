"""Packed batches in a Trainer: refused unless something was said, wherever they turn up."""

from __future__ import annotations

import pytest
import torch
from all_lighthouse import all_lighthouse
from fitting import CONFIG, fit, trainer
from foreign import TOKENS, VOCABULARY, ForeignModule, forget_places
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateFinder
from torch.utils.data import DataLoader

from lightning_lighthouse import Documents, LighthouseCallback, LighthouseConfig
from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.model.decoder import Decoder
from lightning_lighthouse.routing.packing import PackedBatchError
from lightning_lighthouse.routing.reasons import CrossingError
from lightning_lighthouse.routing.scope import scopes
from lightning_lighthouse.training.stopwatch import count_tokens

ROWS = 24


class Named(ForeignModule):
    """Takes dictionaries, of which it reads the tokens."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch["tokens"], batch_idx)

    def validation_step(self, batch, batch_idx):
        return super().validation_step(batch["tokens"], batch_idx)


def rows(first_packed=ROWS):
    """Rows of tokens with ids of their documents, several from one row on."""
    generator = torch.Generator().manual_seed(0)
    ids = (torch.arange(TOKENS + 1) > 50).long()
    return [
        {
            "tokens": torch.randint(VOCABULARY, (TOKENS + 1,), generator=generator),
            "document_ids": ids * (row >= first_packed),
        }
        for row in range(ROWS)
    ]


def loader(first_packed=ROWS):
    return DataLoader(rows(first_packed), batch_size=2)


def module():
    torch.manual_seed(0)
    return Named()


@pytest.mark.parametrize("enabled", [True, False], ids=["lighthouse", "dense baseline"])
def test_a_packed_training_batch_stops_the_fit_before_it_trains(tmp_path, enabled):
    model = module()
    before = [p.clone() for p in model.parameters()]
    callback = all_lighthouse(0.5, CONFIG, enabled=enabled)
    with pytest.raises(PackedBatchError, match="document_ids of a sequence differ"):
        fit(tmp_path, [callback], model, data=loader(0))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_later_packed_batch_stops_it_too_in_the_dense_phase_as_well(tmp_path):
    run = trainer(tmp_path, [all_lighthouse(2, CONFIG)])
    with pytest.raises(PackedBatchError):
        run.fit(module(), loader(2 * 7))
    assert run.global_step == 7


@pytest.mark.parametrize("sanity", [0, 1])
def test_a_packed_validation_batch_stops_the_fit(tmp_path, sanity):
    run = trainer(tmp_path, [all_lighthouse(0.5, CONFIG)], val_check_interval=3, num_sanity_val_steps=sanity)
    with pytest.raises(PackedBatchError):
        run.fit(module(), loader(), loader(0))
    assert run.global_step == (0 if sanity else 3)


def test_a_batch_that_is_packed_on_the_way_is_seen(tmp_path):
    class Packs(Named):
        def on_train_batch_start(self, batch, batch_idx):
            batch["position_ids"] = torch.arange(TOKENS) % 50

    with pytest.raises(PackedBatchError, match="position_ids restart"):
        fit(tmp_path, [all_lighthouse(0.5, CONFIG)], Packs(), data=loader())

    class PacksInTransfer(Named):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return {**batch, "document_ids": batch["document_ids"] + (torch.arange(TOKENS + 1) > 9)}

    with pytest.raises(PackedBatchError, match="document_ids of a sequence differ"):
        fit(tmp_path, [all_lighthouse(0.5, CONFIG)], PacksInTransfer(), data=loader())


def test_what_comes_to_a_batch_on_the_way_is_looked_at_with_what_was_there(tmp_path):
    padding = (torch.arange(TOKENS + 1) < 9).expand(2, -1)
    positions = (torch.arange(TOKENS + 1) - 9).clamp(min=0).expand(2, -1)

    class Pads(Named):
        def on_train_batch_start(self, batch, batch_idx):
            batch["position_ids"] = positions

    data = [{**row, "attention_mask": (~padding[0]).long()} for row in rows()]
    fit(tmp_path, [all_lighthouse(0.5, CONFIG)], Pads(), data=DataLoader(data, batch_size=2))


def test_ignore_trains_as_if_nothing_were_packed(tmp_path):
    packed, _ = fit(tmp_path, [all_lighthouse(0.5, CONFIG, documents="ignore")], module(), data=loader(0))
    plain, _ = fit(tmp_path, [all_lighthouse(0.5, CONFIG)], module(), data=loader())
    assert all(torch.equal(a, b) for a, b in zip(packed.parameters(), plain.parameters(), strict=True))


def test_the_strategy_is_left_as_it_was(tmp_path):
    run = trainer(tmp_path, [all_lighthouse(0.5, CONFIG)], max_steps=2)
    before = dict(vars(run.strategy))
    run.fit(module(), loader())
    assert {"batch_to_device", "training_step"} & set(vars(run.strategy)) == set(before) & {"batch_to_device"}


def decoder():
    return Decoder(num_layers=1, dim=16, num_heads=2, ffn_dim=16, warmup_steps=1)


def test_the_decoder_refuses_what_nobody_was_told_of(tmp_path):
    batch = {name: torch.stack([row[name] for row in rows(0)[:2]]) for name in ("tokens", "document_ids")}
    with pytest.raises(PackedBatchError):
        decoder().loss(batch)
    with pytest.raises(PackedBatchError):
        trainer(tmp_path, []).fit(decoder(), loader(0))
    assert decoder().loss({**batch, "document_ids": torch.zeros_like(batch["tokens"])}).isfinite()
    fit(tmp_path, [all_lighthouse(0.5, CONFIG, documents="ignore")], decoder(), data=loader(0), max_steps=2)
    ignoring = LighthouseCallback(0.5, CONFIG, documents="ignore", enabled=False)
    fit(tmp_path, [ignoring], decoder(), data=loader(0), max_steps=2)


LENGTHS = [50, 1, TOKENS - 51]


class Plain(Named):
    """A document is the same wherever it lies."""

    def __init__(self):
        super().__init__()
        forget_places(self)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch["tokens"]), batch_size=2)


def module_with_documents():
    torch.manual_seed(0)
    return Plain()


def batches(form, count=12):
    """Batches in which documents are said in a form."""
    documents = Documents([LENGTHS, LENGTHS])
    given = {
        "documents": {"documents": documents},
        "document_ids": {"document_ids": documents.document_ids("cpu")},
        "position_ids": {"position_ids": documents.position_ids("cpu")},
    }[form]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(VOCABULARY, (count, 2, TOKENS + 1), generator=generator)
    return [{"tokens": tokens, **given} for tokens in drawn]


class Listed(torch.utils.data.IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def given(form, count=12):
    return DataLoader(Listed(batches(form, count)), batch_size=None)


def trained(tmp_path, form, model=None, steps=6, **settings):
    callback = all_lighthouse(3, CONFIG, documents=True, **settings)
    model = model or module_with_documents()
    validation = given(form, 2)
    return fit(
        tmp_path, [callback], model, data=given(form), validation=validation, max_steps=steps, val_check_interval=2
    )


@pytest.fixture(scope="module")
def by_documents(tmp_path_factory):
    """Trained with documents in their own form."""
    model, run = trained(tmp_path_factory.mktemp("fit"), "documents")
    return list(model.parameters()), run.callback_metrics["val/loss"]


@pytest.mark.parametrize("form", ["document_ids", "position_ids", "method", "method of ids"])
def test_every_form_trains_alike(tmp_path, by_documents, form):
    class Told(Plain):
        def documents(self, batch):
            return Documents([LENGTHS, LENGTHS]) if form == "method" else batch["document_ids"]

    torch.manual_seed(0)
    # what the method says goes before what the batch says
    model = Told() if form.startswith("method") else Plain()
    found, run = trained(tmp_path, "document_ids" if form.startswith("method") else form, model)
    expected, loss = by_documents
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected, strict=True))
    assert torch.equal(run.callback_metrics["val/loss"], loss)


def one_by_one(model, tokens):
    """The loss of the documents of a batch, each attended by itself."""
    inputs = tokens[:, :-1].split(LENGTHS, 1)
    logits = torch.cat([model.model(part) for part in inputs], 1)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("enabled", [True, False], ids=["dense layers", "dense baseline"])
def test_a_dense_training_equals_the_documents_one_by_one(tmp_path, enabled):
    """Sanity check, training over the switch, and validation."""
    # nothing to compress: such a layer is dense inside documents
    whole = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=64)
    callback = all_lighthouse(1, whole, documents=True, enabled=enabled, dense_layers=[0])
    run = trainer(tmp_path, [callback], max_steps=4, num_sanity_val_steps=1, val_check_interval=2)
    model = module_with_documents()
    run.fit(model, given("documents"), given("documents", 2))

    by_hand = module_with_documents()
    optimizer = by_hand.configure_optimizers()
    for batch in batches("documents")[:4]:
        optimizer.zero_grad()
        one_by_one(by_hand, batch["tokens"]).backward()
        optimizer.step()
    for a, b in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    with torch.no_grad():
        expected = torch.stack([one_by_one(by_hand, batch["tokens"]) for batch in batches("documents", 2)]).mean()
    assert run.callback_metrics["val/loss"].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("how", ["validate", "test"])
def test_documents_hold_outside_of_a_fit_too(tmp_path, how):
    class Tests(Plain):
        def test_step(self, batch, batch_idx):
            return self.validation_step(batch, batch_idx)

    torch.manual_seed(0)
    model = Tests()
    run = trainer(tmp_path, [all_lighthouse(1, CONFIG, documents=True)])
    (metrics,) = getattr(run, how)(model, given("documents", 2), verbose=False)
    with torch.no_grad():
        expected = torch.stack([one_by_one(model, batch["tokens"]) for batch in batches("documents", 2)]).mean()
    assert metrics["val/loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert scopes == []
    refusing = trainer(tmp_path, [all_lighthouse(1, CONFIG)])
    with pytest.raises(PackedBatchError):
        getattr(refusing, how)(model, given("document_ids", 2), verbose=False)


class Predicts(Plain):
    def predict_step(self, batch, batch_idx):
        return self.model(batch["tokens"][:, :-1])


def test_documents_hold_in_a_prediction_and_a_batch_without_them_is_left_alone(tmp_path):
    torch.manual_seed(0)
    model = Predicts()
    packed, plain = batches("documents", 1)[0], {"tokens": batches("documents", 1)[0]["tokens"]}
    run = trainer(tmp_path, [all_lighthouse(1, CONFIG, documents=True)])
    before, inside, behind = run.predict(model, DataLoader([plain, packed, plain], batch_size=None))
    with torch.no_grad():
        across = model.model(packed["tokens"][:, :-1])
        parts = [model.model(part) for part in packed["tokens"][:, :-1].split(packed["documents"].lengths[0], 1)]
    torch.testing.assert_close(before, across)
    torch.testing.assert_close(behind, across)
    torch.testing.assert_close(inside, torch.cat(parts, 1))
    assert scopes == []


def test_padding_of_a_prompt_is_no_document(tmp_path):
    torch.manual_seed(0)
    model = Predicts()
    tokens = batches("documents", 1)[0]["tokens"]
    mask = torch.ones(2, TOKENS).long()
    mask[0, :5] = 0
    prompt = {"tokens": tokens, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    run = trainer(tmp_path, [all_lighthouse(1, CONFIG, documents=True)])
    (found,) = run.predict(model, DataLoader([prompt], batch_size=None))
    with torch.no_grad():
        torch.testing.assert_close(found, model.model(tokens[:, :-1]))


def test_a_packed_prediction_is_refused_where_nothing_was_said(tmp_path):
    torch.manual_seed(0)
    run = trainer(tmp_path, [all_lighthouse(1, CONFIG)])
    with pytest.raises(PackedBatchError):
        run.predict(Predicts(), given("document_ids", 1))


def test_a_batch_without_documents_is_an_error(tmp_path):
    with pytest.raises(SettingError, match=r"the batch holds none: add .* documents\(batch\) to Named$") as caught:
        fit(
            tmp_path,
            [all_lighthouse(1, CONFIG, documents=True)],
            module(),
            data=DataLoader([{"tokens": torch.zeros(TOKENS + 1).long()}]),
        )
    assert "\n" not in str(caught.value)
    assert scopes == []


def test_tokens_without_a_name_are_no_ids_of_documents(tmp_path):
    class Whole(ForeignModule):
        """Reads all tokens of a batch, so that ids of as many would fit."""

        def training_step(self, batch, batch_idx):
            return self.model(batch)[:, :-1].flatten(0, 1).logsumexp(-1).mean()

    with pytest.raises(SettingError, match=r"the batch holds none: add .* documents\(batch\) to Whole$"):
        fit(tmp_path, [all_lighthouse(1, CONFIG, documents=True)], Whole())


def test_documents_of_all_targets_are_told_how_to_be_cut(tmp_path):
    with pytest.raises(ValueError, match=r"documents cover 2 x 129 tokens, .* sees 2 x 128; .* document_ids\[:, :-1\]"):
        fit(tmp_path, [all_lighthouse(1, CONFIG, documents=True)], module(), data=loader(0))


@pytest.mark.parametrize("on_unroutable", ["raise", "warn"])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_call_that_would_cross_stops_the_fit_whatever_is_unroutable(tmp_path, on_unroutable, enabled):
    model = module_with_documents()

    class Masked(type(model.model.blocks[2].attn)):
        def forward(self, x):
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return self.out(y.transpose(1, 2).flatten(2))

    model.model.blocks[2].attn.__class__ = Masked
    with pytest.raises(
        CrossingError, match=r"model\.blocks\.2\.attn would attend across documents: attn_mask was given"
    ):
        trained(tmp_path, "documents", model, on_unroutable=on_unroutable, enabled=enabled)
    assert scopes == []


@pytest.mark.parametrize("when", ["always, behind a batch that is passed over", "in eval mode"])
def test_attention_that_is_written_out_stops_the_fit_whenever_it_first_runs(tmp_path, when):
    class PassesOver(Plain):
        def training_step(self, batch, batch_idx):
            return None if "passed over" in when and batch_idx == 0 else super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            if "passed over" not in when or batch_idx > 0:
                super().validation_step(batch, batch_idx)

    torch.manual_seed(0)
    model = PassesOver()

    class WrittenOut(type(model.model.blocks[2].attn)):
        def forward(self, x):
            if self.training and "eval" in when:
                return super().forward(x)
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            y = (q @ k.mT).masked_fill(later, -torch.inf).softmax(-1) @ v
            return self.out(y.transpose(1, 2).flatten(2))

    model.model.blocks[2].attn.__class__ = WrittenOut
    with pytest.raises(RuntimeError, match=r"not seen inside documents: model\.blocks\.2\.attn: no call of scaled_dot"):
        trained(tmp_path, "documents", model, enabled=False, select="*attn")


def test_other_callbacks_find_no_documents_between_batches(tmp_path):
    seen = []

    class Samples(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.eval()
            with torch.no_grad():
                seen.append(pl_module.model(batch["tokens"][:, :20]).shape)
            pl_module.train()

    callback = all_lighthouse(3, CONFIG, documents=True)
    fit(tmp_path, [callback, Samples()], module_with_documents(), data=given("documents"), max_steps=4)
    assert len(seen) == 4


def test_tokens_are_counted_beside_documents():
    documents = Documents([LENGTHS])
    tokens = torch.zeros(1, TOKENS, dtype=torch.long)
    assert count_tokens({"x": tokens, "documents": documents, "document_ids": documents.document_ids("cpu")}) == TOKENS
    assert count_tokens([documents, tokens]) == TOKENS
    assert count_tokens(documents) == 0


def test_a_search_for_the_rate_stays_inside_documents(tmp_path):
    learned = []

    class Finds(Plain):
        learning_rate = 1e-3

        def training_step(self, batch, batch_idx):
            learned.append(next(iter(scopes)).documents)
            return super().training_step(batch, batch_idx)

    finder = LearningRateFinder(num_training_steps=3, update_attr=False)
    torch.manual_seed(0)
    model = Finds()
    fit(tmp_path, [finder, all_lighthouse(2, CONFIG, documents=True)], model, data=given("documents"), max_steps=3)
    assert learned == [Documents([LENGTHS, LENGTHS])] * 6
