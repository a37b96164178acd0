"""What a fit tells those who listen to its phases."""

from __future__ import annotations

import pytest
from all_lighthouse import all_lighthouse
from fitting import CONFIG, fit, module
from foreign import SelfAttention, loader
from lightning.pytorch.callbacks import Callback
from places import DOCS

from lightning_lighthouse.phases import DENSE, LIGHTHOUSE, BatchEnd, BatchStart, FitEnd, FitStart, Switch, phase_events

KINDS = (FitStart, Switch, BatchStart, BatchEnd, FitEnd)


class Listener(Callback):
    """Keeps every event, and at a switch how the model attends."""

    def __init__(self) -> None:
        self.events, self.forwards, self.ends = [], [], []

    def setup(self, trainer, pl_module, stage):
        events = phase_events(trainer)
        self.ends = [events.subscribe(kind, self.events.append) for kind in KINDS]
        self.ends.append(events.subscribe(Switch, lambda event: self.forwards.append(_is_patched(pl_module))))

    def teardown(self, trainer, pl_module, stage):
        for end in self.ends:
            end()


def _is_patched(model) -> bool:
    return any("forward" in vars(part) for part in model.modules() if isinstance(part, SelfAttention))


@pytest.mark.parametrize("listens_first", [True, False])
def test_a_listener_hears_the_whole_fit(tmp_path, listens_first):
    listener = Listener()
    callbacks = [listener, all_lighthouse(0.6, CONFIG)]
    fit(tmp_path, callbacks if listens_first else callbacks[::-1], max_steps=5)
    phases = [LIGHTHOUSE] * 3 + [DENSE] * 2
    expected = [FitStart(0, LIGHTHOUSE)]
    for step, phase in enumerate(phases):
        if step == 3:
            expected.append(Switch(3, DENSE, LIGHTHOUSE))
        expected += [BatchStart(step, phase), BatchEnd(step + 1, phase, (*phases, DENSE)[step + 1])]
    assert listener.events == [*expected, FitEnd(5, DENSE)]
    assert listener.forwards == [True]


def test_a_resumed_run_tells_its_switch_where_an_unbroken_one_does(tmp_path):
    _, first = fit(tmp_path, [all_lighthouse(3, CONFIG)], max_steps=3)
    first.save_checkpoint(tmp_path / "at-the-switch.ckpt")
    listener = Listener()
    fit(tmp_path, [all_lighthouse(3, CONFIG), listener], ckpt_path=tmp_path / "at-the-switch.ckpt", max_steps=5)
    assert listener.events[:3] == [FitStart(3, DENSE), Switch(3, DENSE, LIGHTHOUSE), BatchStart(3, DENSE)]
    assert sum(isinstance(event, Switch) for event in listener.events) == 1


def test_accumulated_batches_switch_between_steps_and_validation_tells_nothing(tmp_path):
    listener = Listener()
    callbacks = [listener, all_lighthouse(2, CONFIG)]
    fit(tmp_path, callbacks, max_steps=3, accumulate_grad_batches=2, validation=loader(2, seed=1), val_check_interval=2)
    assert [event.step for event in listener.events if isinstance(event, BatchStart)] == [0, 0, 1, 1, 2, 2]
    assert [event.step for event in listener.events if isinstance(event, Switch)] == [2]


def test_what_a_listener_raises_ends_the_fit_and_the_model_is_restored(tmp_path):
    class Refuses(Callback):
        def setup(self, trainer, pl_module, stage):
            phase_events(trainer).subscribe(Switch, self.refuse)

        def refuse(self, event):
            raise RuntimeError(f"no switch at {event.step}")

    model = module()
    with pytest.raises(RuntimeError, match="no switch at 3"):
        fit(tmp_path, [Refuses(), all_lighthouse(3, CONFIG)], model, max_steps=5)
    assert not _is_patched(model)


def test_the_page_tells_every_event_and_its_example_runs(tmp_path, capsys):
    page = (DOCS / "use" / "phase-events.md").read_text()
    assert all(f"| `{kind.__name__}` |" in page for kind in KINDS)
    lines = page.split("changed, and the order of the callbacks does not matter.")[1].split("Every event")[0]
    names: dict = {}
    exec("\n".join(line.removeprefix("    ") for line in lines.splitlines()), names)
    fit(tmp_path, [names["SayWhenDense"](), all_lighthouse(2, CONFIG)], max_steps=3)
    assert "step 2: lighthouse -> dense" in capsys.readouterr().out
