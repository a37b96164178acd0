"""How the decoder trains under Lightning's Trainer: data, metrics, optimizer, schedule, checkpoints, settings."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from warned import own_warnings

from lightning_lighthouse.model import Decoder

VOCAB = 61
SIZES = {"num_layers": 2, "dim": 24, "num_heads": 6, "num_kv_heads": 2, "ffn_dim": 29, "vocab_size": VOCAB}


def make_decoder(**settings: Any) -> Decoder:
    torch.manual_seed(42)
    return Decoder(**{**SIZES, **settings})


def make_tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(7))


class Batches(pl.LightningDataModule):
    """The same few batches for training, validation and test."""

    def __init__(self, *batches: Any, **properties: Any) -> None:
        super().__init__()
        self.batches = batches
        vars(self).update(properties)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]

    val_dataloader = test_dataloader = train_dataloader


def make_trainer(**settings: Any) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(accelerator="cpu", **{**quiet, **settings})


def test_overfits_a_short_text() -> None:
    text = torch.tensor([list(b"Abide with me; fast falls the eventide.")])
    torch.manual_seed(42)
    model = Decoder(**{**SIZES, "vocab_size": 257}, warmup_steps=5, learning_rate=2e-2, weight_decay=0.0)
    trainer = make_trainer(max_steps=120, gradient_clip_val=1.0)
    trainer.fit(model, Batches(*[{"tokens": text}] * 120))
    assert model.loss(text).item() < 0.1


def test_dict_and_tensor_batches_are_one() -> None:
    model = make_decoder()
    tokens = make_tokens(2, 30)
    assert torch.equal(model.loss(tokens), model.loss({"tokens": tokens}))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": torch.zeros(2, 9)}, "the batch must hold 'tokens', got 'input_ids'"),
        (torch.zeros(9), r"tokens must be \[batch, at least 2 tokens\], got \[9\]"),
        ({"tokens": torch.zeros(3, 1)}, r"tokens must be \[batch, at least 2 tokens\], got \[3, 1\]"),
    ],
)
def test_a_wrong_batch_is_named(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        make_decoder().loss(batch)


def test_losses_are_the_same_in_any_chunks() -> None:
    whole, parts = make_decoder().double(), make_decoder(loss_chunk=7).double()
    parts.load_state_dict(whole.state_dict())
    tokens = make_tokens(2, 31)
    losses = [model.loss(tokens) for model in (whole, parts)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    torch.testing.assert_close(whole.token_losses(inputs, targets), parts.token_losses(inputs, targets))


def test_validation_weighs_by_tokens_and_counts_bytes() -> None:
    model = make_decoder()
    batches = [{"tokens": make_tokens(1, 200)}, {"tokens": make_tokens(3, 12)}]
    trainer = make_trainer()
    (logged,) = trainer.validate(model, Batches(*batches, bytes_per_token=3.5), verbose=False)
    with torch.no_grad():
        sums = [model.loss(batch) * batch["tokens"][:, 1:].numel() for batch in batches]
    expected = sum(sums).item() / (199 + 33)
    assert logged["val/loss"] == pytest.approx(expected, rel=1e-6)
    assert logged["val/bits_per_byte"] == pytest.approx(expected / math.log(2) / 3.5, rel=1e-6)


def test_bits_per_byte_need_the_bytes_of_a_token() -> None:
    (logged,) = make_trainer().test(make_decoder(), Batches(make_tokens(1, 9), bytes_per_token=None), verbose=False)
    assert set(logged) == {"test/loss"}


def test_a_validation_loss_that_is_not_a_number_shows() -> None:
    model = make_decoder()
    nn.init.constant_(model.embedding.weight[5], math.nan)
    good, bad = torch.full((1, 9), 7), torch.full((1, 9), 5)
    (logged,) = make_trainer().validate(model, Batches(good, bad, good), verbose=False)
    assert math.isnan(logged["val/loss"])


def test_a_small_vocabulary_is_refused() -> None:
    data = Batches(make_tokens(1, 9), vocab_size=VOCAB + 1)
    with pytest.raises(ValueError, match=r"^vocab_size must be at least the 62 of the data's tokenizer, got 61$"):
        make_trainer(max_steps=1).fit(make_decoder(), data)


def test_bfloat16_training_clips_and_validates_first() -> None:
    """The sanity validation runs in inference mode, and Lightning would refuse to clip before a fused optimizer."""
    model = make_decoder(learning_rate=1.0, warmup_steps=0, weight_decay=0.0)
    norms: list[float] = []

    class Norm(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters()]).item())

    class Clipped(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters()]).item())

    trainer = make_trainer(max_steps=2, precision="bf16-mixed", gradient_clip_val=1e-3, callbacks=[Norm(), Clipped()])
    trainer.fit(model, Batches(*[{"tokens": make_tokens(2, 40)}] * 2))
    assert norms[0] > 1e-2
    assert norms[1] == pytest.approx(1e-3, rel=1e-2)


def test_weight_decay_touches_matrices_only() -> None:
    (optimizer,), _ = _optimizers(make_decoder(weight_decay=0.25))
    decayed, kept = optimizer.param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.25, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in kept["params"]} == {1}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(make_decoder().parameters()))


def _optimizers(model: Decoder) -> Any:
    configured = model.configure_optimizers()
    return [configured["optimizer"]], [configured["lr_scheduler"]["scheduler"]]


class RateOfEachStep(pl.Callback):
    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *unused: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def rates_of(steps: int, **settings: Any) -> list[float]:
    callback = RateOfEachStep()
    data = Batches(*[make_tokens(1, 5)] * steps)
    make_trainer(max_steps=steps, callbacks=[callback]).fit(make_decoder(learning_rate=0.5, **settings), data)
    return callback.rates


def test_constant_schedule_warms_up_and_stays() -> None:
    rates = rates_of(9, warmup_steps=5)
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5])
    assert rates_of(2, warmup_steps=0) == pytest.approx([0.5, 0.5])


def test_wsd_schedule_decays_over_its_fraction() -> None:
    rates = rates_of(20, warmup_steps=4, schedule="wsd", decay_fraction=0.25)
    assert rates == pytest.approx([0.125, 0.25, 0.375, *[0.5] * 13, 0.4, 0.3, 0.2, 0.1])


def test_wsd_needs_the_number_of_steps() -> None:
    class Unsized(IterableDataset):
        def __iter__(self) -> Any:
            return iter([make_tokens(1, 5)] * 3)

    trainer = make_trainer(max_epochs=1)
    with pytest.raises(ValueError, match=r"^schedule='wsd' needs a known number of steps, .* set trainer.max_steps"):
        trainer.fit(make_decoder(schedule="wsd"), DataLoader(Unsized(), batch_size=None))


def test_resumed_training_equals_unbroken_training(tmp_path: Path) -> None:
    data = Batches(*({"tokens": make_tokens(2, 20 + step)} for step in range(4)))
    settings = {"warmup_steps": 6, "schedule": "wsd", "decay_fraction": 0.5}
    checkpoint = tmp_path / "epoch.ckpt"

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(checkpoint)

    unbroken, resumed = make_decoder(**settings), make_decoder(**settings)
    make_trainer(max_steps=8, callbacks=[Save()]).fit(unbroken, data)
    make_trainer(max_steps=8).fit(resumed, data, ckpt_path=checkpoint, weights_only=True)
    for name, value in unbroken.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_optimizer_settings_changed_on_resume_are_told_once(tmp_path: Path) -> None:
    data, checkpoint = Batches(make_tokens(2, 20)), tmp_path / "model.ckpt"
    first = make_trainer(max_steps=2, max_epochs=-1)
    settings = {"learning_rate": 1e-2, "warmup_steps": 4}
    first.fit(make_decoder(**settings), data)
    first.save_checkpoint(checkpoint)

    def resumed(**changed: Any) -> tuple[list[str], dict[str, Any]]:
        trainer, model = make_trainer(max_steps=4, max_epochs=-1), make_decoder(**{**settings, **changed})
        with own_warnings() as lines:
            trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
        return lines, trainer.optimizers[0].param_groups[0]

    assert resumed()[0] == []
    assert resumed(betas=[0.9, 0.95], learning_rate=1e-2 * (1 + 1e-12), warmup_steps=3)[0] == []
    lines, group = resumed(learning_rate=1e-5, weight_decay=0.5, betas=(0.8, 0.9), eps=1e-6)
    assert (group["initial_lr"], group["weight_decay"]) == (1e-2, 0.1)
    assert lines == [
        "Lighthouse: the run goes on with learning_rate=0.01, betas=(0.9, 0.95), eps=1e-08, weight_decay=0.1 of its "
        "checkpoint, though the settings now say learning_rate=1e-05, betas=(0.8, 0.9), eps=1e-06, weight_decay=0.5; "
        "for these, begin a new run from the checkpoint's weights (docs/use/reliability.md)"
    ]


def test_a_finder_of_rates_is_no_changed_setting() -> None:
    model, trainer = make_decoder(warmup_steps=0), make_trainer(max_steps=2, max_epochs=-1)
    with own_warnings() as lines:
        Tuner(trainer).lr_find(model, datamodule=Batches(make_tokens(2, 20)), num_training=12)
    assert lines == []


class Derived(Decoder):
    """Passes on other values than it is given, under the same names."""

    def __init__(self, learning_rate: float = 1e-3, dim: int = 12, checkpoint: str = "of its own") -> None:
        sizes = {**SIZES, "dim": 2 * dim}
        super().__init__(learning_rate=8 * learning_rate, loss_chunk=4, warmup_steps=0, **sizes)  # type: ignore[arg-type]


def test_what_a_derived_class_passes_on_is_in_force(tmp_path: Path) -> None:
    torch.manual_seed(42)
    model, trainer = Derived(), make_trainer(max_steps=1)
    assert (model.embedding.weight.shape, model.own_settings["checkpoint"]) == ((VOCAB, 24), "none")
    trainer.fit(model, Batches(make_tokens(1, 9)))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 8e-3
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    restored = Derived.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert restored.own_settings == model.own_settings
    tokens = make_tokens(2, 30)
    assert torch.equal(restored(tokens), model(tokens))


@pytest.mark.parametrize("kind", [Decoder, Derived])
def test_a_rate_set_in_hparams_is_in_force_as_finders_set_it(kind: type[Decoder]) -> None:
    model = kind()
    model.hparams["learning_rate"] = 5e-4
    (group, _) = model.configure_optimizers()["optimizer"].param_groups  # type: ignore
    assert group["initial_lr"] == 5e-4


def test_a_checkpoint_restores_model_and_settings(tmp_path: Path) -> None:
    model = make_decoder(betas=(0.8, 0.9), rope_theta=5e5)
    trainer = make_trainer(max_steps=1)
    trainer.fit(model, Batches(make_tokens(1, 9)))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    restored = Decoder.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert dict(restored.hparams) == dict(model.hparams)
    tokens = make_tokens(2, 30)
    assert torch.equal(restored(tokens), model(tokens))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "huge"}, "preset must be one of 'toy', 'small', 'base', 'paper', got 'huge'"),
        ({"schedule": "cosine"}, "schedule must be 'constant' or 'wsd', got 'cosine'"),
        ({"checkpoint": "layer"}, "checkpoint must be 'none' or 'block', got 'layer'"),
        ({"num_layers": 0}, "num_layers must be greater than 0, got 0"),
        ({"dim": 30}, "dim must be a multiple of 2 * num_heads = 12, got 30"),
        ({"num_kv_heads": 4}, "num_kv_heads must divide num_heads = 6, got 4"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be greater than 0, got -1.0"),
        ({"learning_rate": math.nan}, "learning_rate must be greater than 0, got nan"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers in [0, 1), got (0.9, 1.0)"),
        ({"betas": (0.9,)}, "betas must be two numbers in [0, 1), got (0.9,)"),
        ({"eps": 0.0}, "eps must be greater than 0, got 0.0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"decay_fraction": 0.0}, "decay_fraction must be in (0, 1], got 0.0"),
        ({"loss_chunk": 0}, "loss_chunk must be at least 1, got 0"),
    ],
)
def test_a_wrong_setting_is_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_decoder(**settings)


def test_given_heads_bring_their_own_key_value_heads() -> None:
    assert Decoder(num_heads=2).shape.num_kv_heads == 2
    assert Decoder(num_heads=8, num_kv_heads=2).shape.num_kv_heads == 2
