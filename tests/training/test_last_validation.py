"""`final.pt` and the final loss belong to the same weights, however a training ends; one that ends early says so."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from fitting import CONFIG, fit
from foreign import ForeignModule, ResumableLoader, loader
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from lightning_lighthouse import LighthouseCallback, PlateauRule
from lightning_lighthouse.runs.checkpoint import Checkpoint
from lightning_lighthouse.training import last_validation
from lightning_lighthouse.training.last_validation import _checksums


def train(tmp_path, *callbacks, every=4, steps=10, switch=6, **settings):
    settings = {"val_check_interval": every, "max_steps": steps} | settings
    validation = loader(4, seed=1)
    return fit(tmp_path, [LighthouseCallback(switch, CONFIG), *callbacks], validation=validation, **settings)


def report(tmp_path):
    return json.loads((tmp_path / "lighthouse.json").read_text())


def loss_of(final):
    """The validation loss of the weights in a file, by hand."""
    model = ForeignModule()
    model.load_state_dict(torch.load(final, weights_only=True))
    with torch.no_grad():
        return sum(model.loss(batch).item() for batch in loader(4, seed=1)) / 2


@pytest.mark.parametrize("every", [4, 5, 7])
def test_the_final_loss_is_that_of_the_final_weights(every, tmp_path):
    train(tmp_path, every=every)
    told = report(tmp_path)
    expected = sorted({*range(every, 11, every), 10})
    assert [v["step"] for v in told["validations"]] == expected
    assert told["final"] == {"step": 10, "loss": told["validations"][-1]["loss"], "is_of_final_weights": True}
    assert told["final"]["loss"] == pytest.approx(loss_of(tmp_path / "final.pt"), rel=1e-5)


class Stop(Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= 3


EARLY = {
    "should_stop": ({}, lambda: Stop()),
    "EarlyStopping": ({}, lambda: EarlyStopping("val/loss", patience=1, min_delta=1e9)),
    "max_time": ({"max_time": {"milliseconds": 1}}, None),
}


@pytest.mark.parametrize(("settings", "make"), EARLY.values(), ids=EARLY)
def test_a_training_that_ends_before_its_switch_says_so(settings, make, tmp_path):
    callbacks = [make()] if make else []
    with pytest.warns(
        UserWarning, match=r"ended at step \d+, before the switch to dense attention at step 9: the model"
    ):
        train(tmp_path, *callbacks, every=2, switch=9, **settings)
    told = report(tmp_path)
    assert told["steps"] < 9
    assert told["switch"]["switched"] is False
    assert told["final"]["step"] == told["steps"]
    assert told["final"]["loss"] == pytest.approx(loss_of(tmp_path / "final.pt"), rel=1e-5)


def test_it_is_logged_and_kept_as_the_others(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=-1, filename="{step}")
    train(tmp_path, best, logger=CSVLogger(tmp_path, version="a"), enable_checkpointing=True, log_every_n_steps=1)
    rows = list(csv.DictReader((tmp_path / "lightning_logs" / "a" / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows if row["val/loss"]] == [3, 7, 9]
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {f"step={step}.ckpt" for step in (4, 8, 10)}


@pytest.mark.parametrize("settings", [{"limit_val_batches": 0}, {"fast_dev_run": 3, "max_steps": -1}])
def test_a_fit_without_validation_has_none_at_its_end(settings, tmp_path):
    model, _ = train(tmp_path, **settings)
    # a fast run validates by itself
    assert len(model.validation_losses) == (2 if "fast_dev_run" in settings else 0)


def test_the_plateau_rule_is_not_asked_at_the_end(tmp_path):
    callback = LighthouseCallback(100, CONFIG, plateau=PlateauRule(patience=1, min_gain_per_second=1e9))
    fit(tmp_path, [callback], ForeignModule(), validation=loader(4, seed=1), max_steps=3, val_check_interval=2)
    assert report(tmp_path)["switch"]["by_plateau"] is False


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_progress_bars_take_it(bar, tmp_path, capsys):
    for callbacks in ([LighthouseCallback(6, CONFIG), bar()], [bar(), LighthouseCallback(6, CONFIG)]):
        settings = {"enable_progress_bar": True, "val_check_interval": 4}
        model, _ = fit(tmp_path, callbacks, validation=loader(4, seed=1), **settings)
        assert len(model.validation_losses) == 6
    assert "Traceback" not in capsys.readouterr().err


def test_a_longer_training_goes_on_from_it_as_from_any_step(tmp_path):
    def data():
        return ResumableLoader(24)

    whole, _ = train(tmp_path / "whole", steps=12, data=data())
    saving = Checkpoint(tmp_path, save_last=True)
    first, _ = train(tmp_path / "parts", saving, steps=7, data=data(), enable_checkpointing=True)
    last = tmp_path / "last.ckpt"
    second, _ = train(tmp_path / "parts", steps=12, data=data(), ckpt_path=last)
    assert first.losses + second.losses == whole.losses
    steps = [v["step"] for v in report(tmp_path / "parts")["validations"]]
    assert steps == [4, 7, 8, 12]


def test_a_run_killed_behind_its_last_step_is_ended_when_it_is_resumed(tmp_path):
    class KilledError(Exception):
        """Stands for the kill: nothing of the run's end happens."""

    class Kill(Callback):
        def on_train_end(self, trainer, pl_module):
            raise KilledError

    saving = Checkpoint(tmp_path, save_last=True, every_n_train_steps=1)
    with pytest.raises(KilledError):
        fit(tmp_path / "parts", [Kill(), LighthouseCallback(6, CONFIG), saving], enable_checkpointing=True)
    assert not (tmp_path / "parts").exists()
    train(tmp_path / "parts", ckpt_path=tmp_path / "last.ckpt")
    train(tmp_path / "whole")
    ended, whole = (torch.load(tmp_path / name / "final.pt", weights_only=True) for name in ("parts", "whole"))
    assert all(torch.equal(ended[name], value) for name, value in whole.items())
    told = report(tmp_path / "parts")
    assert (told["steps"], told["switch"]["switched"], told["phases"]["dense"]["steps"]) == (10, True, 4)


def test_a_final_loss_of_other_weights_is_marked(tmp_path, caplog):
    # validated at step 8, saved at step 10, and then killed
    saving = Checkpoint(tmp_path, save_last=True, every_n_train_steps=10)

    class Kill(Callback):
        def on_train_end(self, trainer, pl_module):
            raise ArithmeticError

    callbacks = [Kill(), LighthouseCallback(6, CONFIG), saving]
    with pytest.raises(ArithmeticError):
        fit(tmp_path, callbacks, validation=loader(4, seed=1), val_check_interval=4, enable_checkpointing=True)
    train(tmp_path, ckpt_path=tmp_path / "last.ckpt")
    final = report(tmp_path)["final"]
    assert (final["step"], final["is_of_final_weights"]) == (8, False)


class Moves(SingleDeviceStrategy):
    """Leaves the weights laid out otherwise behind a training, as a move from a GPU to the CPU leaves them."""

    def teardown(self):
        # what sums floats in the order of memory finds others; a tensor of several names becomes one for each
        self.lightning_module._apply(lambda tensor: tensor.T.clone().contiguous().T)
        super().teardown()


class Tables(ForeignModule):
    """With one table of numbers in two layers."""

    def __init__(self):
        super().__init__()
        table = torch.randn(5, 7)
        for block in self.model.blocks[:2]:
            block.register_buffer("table", table)


@pytest.mark.parametrize("kind", [ForeignModule, Tables])
def test_weights_that_are_moved_have_not_changed(kind, tmp_path, recwarn):
    train(tmp_path, every=5, strategy=Moves("cpu"), model=kind())
    assert report(tmp_path)["final"]["is_of_final_weights"] is True
    assert not [w for w in recwarn if "whose loss is not that of final.pt" in str(w.message)]


def checksums(value):
    module = nn.Module()
    module.register_buffer("value", value)
    return {name: [int(piece) for piece in pieces] for name, pieces in _checksums(module).items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_checksums_do_not_depend_on_the_order_and_see_the_smallest_change(dtype, monkeypatch):
    values = torch.randn(257, 129, generator=torch.Generator().manual_seed(0)).to(dtype)
    first = checksums(values)
    assert checksums(values.T.contiguous().T) == first
    # by its last bit
    values.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[values.element_size()])[200, 100] ^= 1
    assert checksums(values) != first
    whole = sum(checksums(values)["value"])
    monkeypatch.setattr(last_validation, "PIECE", 1000)
    pieces = checksums(values)["value"]
    # sums of 64 bits wrap around
    assert (len(pieces), (sum(pieces) - whole) % 2**64) == (34, 0)


class Wrapped(Tensor):
    """Holds no numbers that could be viewed, as a quantized weight."""

    @staticmethod
    def __new__(cls):
        return Tensor._make_wrapper_subclass(cls, (3, 5))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


@pytest.mark.parametrize("make", [Wrapped, lambda: torch.eye(3).to_sparse()], ids=["wrapped", "sparse"])
def test_a_weight_whose_bits_cannot_be_seen_is_left_out(make):
    assert checksums(make()) == {}


def test_so_is_a_layer_that_has_not_been_called():
    assert _checksums(nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(4))).keys() == {"0.weight", "0.bias"}


class Halves(Callback):
    """Changes the weights when the training has ended."""

    def on_train_end(self, trainer, pl_module):
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.mul_(0.5)


AVERAGES = {
    "SWA": lambda: StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1),
    "EMA": lambda: EMAWeightAveraging(decay=0.5),
    "own": Halves,
}


@pytest.mark.parametrize("is_first", [True, False], ids=["before ours", "behind ours"])
@pytest.mark.parametrize("make", AVERAGES.values(), ids=AVERAGES)
def test_weights_that_hooks_change_at_the_end_are_validated_or_marked(make, is_first, tmp_path, recwarn):
    own = LighthouseCallback(6, CONFIG)
    callbacks = [make(), own] if is_first else [own, make()]
    # the last validation falls on the last step; three epochs, so that averages begin
    fit(tmp_path, callbacks, data=loader(8), validation=loader(4, seed=1), max_epochs=3, max_steps=-1)
    told = report(tmp_path)
    final = told["final"]
    assert final["step"] == told["steps"] == 12
    is_of_final_weights = final["loss"] == pytest.approx(loss_of(tmp_path / "final.pt"), rel=1e-5)
    assert final["is_of_final_weights"] is is_of_final_weights
    warned = [w for w in recwarn if "whose loss is not that of final.pt" in str(w.message)]
    assert len(warned) == (not is_of_final_weights)
    # averages validate what they end with, and what comes before ours is validated once more
    assert is_of_final_weights or not (is_first or isinstance(callbacks[-1], EMAWeightAveraging))
