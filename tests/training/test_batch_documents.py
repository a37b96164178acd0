"""Packed batches in a Trainer: refused unless something was said, wherever they turn up."""

from __future__ import annotations

import pytest
import torch
from fitting import CONFIG, fit, trainer
from foreign import TOKENS, VOCABULARY, ForeignModule
from torch.utils.data import DataLoader

from lightning_lighthouse import LighthouseCallback
from lightning_lighthouse.model.decoder import Decoder
from lightning_lighthouse.routing.packing import PackedBatchError

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
    callback = LighthouseCallback(0.5, CONFIG, enabled=enabled)
    with pytest.raises(PackedBatchError, match="document_ids of a sequence differ"):
        fit(tmp_path, [callback], model, data=loader(0))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_later_packed_batch_stops_it_too_in_the_dense_phase_as_well(tmp_path):
    run = trainer(tmp_path, [LighthouseCallback(2, CONFIG)])
    with pytest.raises(PackedBatchError):
        run.fit(module(), loader(2 * 7))
    assert run.global_step == 7


@pytest.mark.parametrize("sanity", [0, 1])
def test_a_packed_validation_batch_stops_the_fit(tmp_path, sanity):
    run = trainer(tmp_path, [LighthouseCallback(0.5, CONFIG)], val_check_interval=3, num_sanity_val_steps=sanity)
    with pytest.raises(PackedBatchError):
        run.fit(module(), loader(), loader(0))
    assert run.global_step == (0 if sanity else 3)


def test_a_batch_that_is_packed_on_the_way_is_seen(tmp_path):
    class Packs(Named):
        def on_train_batch_start(self, batch, batch_idx):
            batch["position_ids"] = torch.arange(TOKENS) % 50

    with pytest.raises(PackedBatchError, match="position_ids restart"):
        fit(tmp_path, [LighthouseCallback(0.5, CONFIG)], Packs(), data=loader())

    class PacksInTransfer(Named):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return {**batch, "document_ids": batch["document_ids"] + (torch.arange(TOKENS + 1) > 9)}

    with pytest.raises(PackedBatchError, match="document_ids of a sequence differ"):
        fit(tmp_path, [LighthouseCallback(0.5, CONFIG)], PacksInTransfer(), data=loader())


def test_ignore_trains_as_if_nothing_were_packed(tmp_path):
    packed, _ = fit(tmp_path, [LighthouseCallback(0.5, CONFIG, documents="ignore")], module(), data=loader(0))
    plain, _ = fit(tmp_path, [LighthouseCallback(0.5, CONFIG)], module(), data=loader())
    assert all(torch.equal(a, b) for a, b in zip(packed.parameters(), plain.parameters(), strict=True))


def test_the_strategy_is_left_as_it_was(tmp_path):
    run = trainer(tmp_path, [LighthouseCallback(0.5, CONFIG)], max_steps=2)
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
    fit(tmp_path, [LighthouseCallback(0.5, CONFIG, documents="ignore")], decoder(), data=loader(0), max_steps=2)
    ignoring = LighthouseCallback(0.5, CONFIG, documents="ignore", enabled=False)
    fit(tmp_path, [ignoring], decoder(), data=loader(0), max_steps=2)
