"""A training that is told nothing of its layers, and runs that began with another default."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from all_lighthouse import all_lighthouse
from fitting import CONFIG, fit
from foreign import ForeignModule, SelfAttention
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_lighthouse import LighthouseCallback
from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.phases import BatchStart, phase_events

KEPT = "this run began with Lighthouse in all layers, and goes on so"


class Watch(Callback):
    """How the layers attend in each training batch, a letter a layer, by step; and the window."""

    def __init__(self):
        self.types, self.windows = {}, set()

    def setup(self, trainer, pl_module, stage):
        layers = [part for part in pl_module.modules() if isinstance(part, SelfAttention)]

        def note(event):
            scope = layers[0].__dict__.get("_lighthouse_scope") or layers[-1]._lighthouse_scope
            routes = [layer.__dict__.get("_lighthouse_route") for layer in layers]
            kinds = [route.layer_type if route and scope.is_on else "dense" for route in routes]
            self.types[event.step] = "".join({"window": "w", "lighthouse": "L", "dense": "d"}[kind] for kind in kinds)
            self.windows.add(scope.settings.window)

        phase_events(trainer).subscribe(BatchStart, note)


def saving(folder):
    return ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=1)


def at_step(folder, step):
    return next(folder.glob(f"*step={step}.ckpt"))


def report(folder):
    return json.loads((folder / "lighthouse.json").read_text())


def plan_of(folder):
    return report(folder)["plan"]


def same_weights(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("count", "types", "words"),
    [
        (1, "L", "lighthouse"),
        (2, "wL", "window 512 + lighthouse"),
        (4, "wwwL", "window 512 \u00d73 + lighthouse"),
        (6, "wLwwwL", "window 512 + lighthouse + window 512 \u00d73 + lighthouse"),
    ],
)
def test_nothing_said_ends_with_a_layer_of_lighthouse(tmp_path, count, types, words):
    watch = Watch()
    fit(tmp_path, [LighthouseCallback(2, CONFIG), watch], ForeignModule(count), max_steps=3)
    assert watch.types == {0: types, 1: types, 2: "d" * count}
    assert watch.windows == {512 if "w" in types else None}
    told = plan_of(tmp_path)
    assert [phase["name"] for phase in told] == [words, "dense"]
    assert "".join({"window": "w", "lighthouse": "L"}[kind] for kind in told[0]["layer_types"]) == types
    assert told[0]["window"] == (512 if "w" in types else None)


def test_a_window_and_dense_layers_change_the_mixture(tmp_path):
    watch = Watch()
    callback = LighthouseCallback(1, CONFIG, [0, 3], window=8, sink_tokens=2)
    fit(tmp_path, [callback, watch], ForeignModule(8), max_steps=2)
    assert watch.types == {0: "dwwdwwwL", 1: "d" * 8}
    assert watch.windows == {8}
    assert plan_of(tmp_path)[0]["name"] == "window 8 (2 sinks) \u00d73 + lighthouse"


def test_a_window_has_no_place_in_a_model_of_one_layer(tmp_path):
    with pytest.raises(SettingError, match="window is for layer_types 'window' and 'chunk', got 8 with"):
        fit(tmp_path, [LighthouseCallback(1, CONFIG, window=8)], ForeignModule(1), max_steps=2)


def test_it_trains_as_the_same_layers_named(tmp_path):
    torch.manual_seed(0)
    models = [ForeignModule(6) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    named = ["window", "lighthouse", "window", "window", "window", "lighthouse"]
    callbacks = LighthouseCallback(3, CONFIG, window=8), LighthouseCallback(3, CONFIG, layer_types=named, window=8)
    for number, (callback, model) in enumerate(zip(callbacks, models, strict=True)):
        fit(tmp_path / str(number), [callback], model, max_steps=4)
    assert same_weights(*models)


def test_a_run_goes_on_with_the_default_that_it_began_with(tmp_path):
    whole, _ = fit(tmp_path / "whole", [LighthouseCallback(5, CONFIG), saving(tmp_path)], enable_checkpointing=True)
    watch = Watch()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*Lighthouse")
        resumed, _ = fit(tmp_path, [LighthouseCallback(5, CONFIG), watch], ckpt_path=at_step(tmp_path, 3))
    assert watch.types == {3: "wwwL", 4: "wwwL", **dict.fromkeys(range(5, 10), "dddd")}
    assert same_weights(whole, resumed)


def test_a_run_that_began_with_lighthouse_in_all_layers_goes_on_so_bit_for_bit(tmp_path):
    whole, _ = fit(tmp_path / "whole", [all_lighthouse(5, CONFIG), saving(tmp_path)], enable_checkpointing=True)
    watch = Watch()
    with pytest.warns(UserWarning, match=KEPT):
        resumed, _ = fit(tmp_path, [LighthouseCallback(5, CONFIG), watch], ckpt_path=at_step(tmp_path, 3))
    assert watch.types == {3: "LLLL", 4: "LLLL", **dict.fromkeys(range(5, 10), "dddd")}
    assert same_weights(whole, resumed)
    assert [(phase["name"], phase.get("layer_types")) for phase in plan_of(tmp_path)] == [
        ("lighthouse", ["lighthouse"]),
        ("dense", None),
    ]
    # and so does what goes on from there, also where nothing is said of what is over
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*Lighthouse")
        fit(tmp_path / "dense", [LighthouseCallback(5, CONFIG)], ckpt_path=at_step(tmp_path, 8))
    phases = report(tmp_path / "dense")["phases"]
    assert {name: phase["steps"] for name, phase in phases.items()} == {"lighthouse": 5, "dense": 5}


def test_a_run_that_is_over_is_reported_as_it_began(tmp_path):
    fit(tmp_path / "whole", [all_lighthouse(5, CONFIG), saving(tmp_path)], enable_checkpointing=True)
    fit(tmp_path / "again", [LighthouseCallback(5, CONFIG)], ckpt_path=at_step(tmp_path, 10))
    assert plan_of(tmp_path / "again")[0]["layer_types"] == ["lighthouse"]


def test_who_says_something_changes_a_run_that_began_otherwise(tmp_path):
    fit(tmp_path / "whole", [all_lighthouse(5, CONFIG), saving(tmp_path)], enable_checkpointing=True)
    watch = Watch()
    with pytest.warns(UserWarning, match="the phases were changed, from step 3 on: 'window 8 \u00d73 \\+ lighthouse'"):
        fit(tmp_path, [LighthouseCallback(5, CONFIG, window=8), watch], ckpt_path=at_step(tmp_path, 3))
    assert watch.types[3] == "wwwL"
