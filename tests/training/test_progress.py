"""How far a run is: the bar, the lines without a terminal, the time left by phase, the last lines."""

from __future__ import annotations

import re

import pytest
from all_lighthouse import all_lighthouse
from fitting import CONFIG, fit
from foreign import loader
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_lighthouse import LighthouseCallback, Phase
from lightning_lighthouse.training import progress

PHASES = [Phase(2, ["window"], window=16), Phase(6)]


class Bar(TQDMProgressBar):
    """Keeps what it showed after each batch."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.shown.append((self.get_metrics(trainer, pl_module), self.train_progress_bar.bar_format))


def test_a_bar_shows_phase_switch_loss_speed_and_time_left(tmp_path):
    bar = Bar()
    callback = LighthouseCallback(phases=PHASES, attention=CONFIG)
    fit(tmp_path, [callback, bar], enable_progress_bar=True, log_every_n_steps=1)
    items = [shown for shown, _ in bar.shown]
    assert [shown["phase"] for shown in items] == ["window 16"] + ["lighthouse"] * 4 + ["dense"] * 5
    assert [shown.get("switch_in") for shown in items] == ["1", "4", "3", "2", "1", *[None] * 5]
    assert all(float(shown["loss"]) > 0 for shown in items)
    assert all(re.fullmatch(r"[\d,]+", shown["tokens/s"]) for shown in items[3:5])
    # what has not run yet is estimated, and says so
    assert all(re.fullmatch(r"~\d+:\d\d", shown["left"]) for shown in items[:5])
    assert items[-1]["left"] == "0:00"
    assert "v_num" not in items[0]
    # tqdm's own estimate is that of the epoch
    assert not any("remaining" in form for _, form in bar.shown)
    assert set(vars(bar)) & {"get_metrics", "init_train_tqdm"} == set()


def test_rich_is_given_the_same_and_no_estimate_of_its_own(tmp_path):
    pytest.importorskip("rich", reason="rich is not installed")

    class Trainer:
        progress_bar_callback = RichProgressBar()

    bar = Trainer.progress_bar_callback
    bar.get_metrics = lambda trainer, module: {"own": 1}
    with progress.shown_progress(Trainer, lambda: {"phase": "dense"}):
        assert bar.get_metrics(None, None) == {"phase": "dense", "own": 1}
        assert progress.RICH_ESTIMATE not in [type(column).__name__ for column in bar.configure_columns(None)]
    assert bar.get_metrics(None, None) == {"own": 1}
    assert progress.RICH_ESTIMATE in [type(column).__name__ for column in bar.configure_columns(None)]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_lines_stand_in_where_no_terminal_shows_the_bar(tmp_path, monkeypatch, caplog, capsys, is_terminal):
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    monkeypatch.setattr(progress, "is_terminal", lambda stream: is_terminal)
    with caplog.at_level("INFO"):
        _, run = fit(tmp_path, [all_lighthouse(4, CONFIG)], enable_progress_bar=True, log_every_n_steps=1)
    lines = [line for line in caplog.messages if line.startswith("Lighthouse: step ")]
    assert len(lines) == (0 if is_terminal else 10)
    if not is_terminal:
        pattern = (
            r"Lighthouse: step 3 of 10, lighthouse, 1 steps to the switch, loss [\d.]+, [\d,]+ tokens/s, ~\d+:\d\d left"
        )
        assert re.fullmatch(pattern, lines[2])
        assert re.fullmatch(r"Lighthouse: step 9 of 10, dense, loss [\d.]+, [\d,]+ tokens/s, 0:0\d left", lines[8])
        assert run.progress_bar_callback.is_enabled


def test_no_bar_wanted_is_no_line_either(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    with caplog.at_level("INFO"):
        fit(tmp_path, [all_lighthouse(4, CONFIG)])
    assert not [line for line in caplog.messages if line.startswith("Lighthouse: step ")]


def test_a_run_ends_with_six_lines_at_most(tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    board = TensorBoardLogger("runs", name="", version="one")
    with caplog.at_level("INFO"):
        fit("runs", [all_lighthouse(4, CONFIG)], logger=board, validation=loader(4, seed=1), val_check_interval=4)
    said = [line for record in caplog.messages for line in record.splitlines()]
    stopped = next(index for index, line in enumerate(said) if "stopped: `max_steps" in line)
    last = [line.removeprefix("Lighthouse: ") for line in said[stopped + 1 :]]
    assert len(last) <= 6
    losses, time, files, curves, following = last
    number = r"\d+\.\d{4}"
    pattern = rf"dense validation loss: {number} before the switch \(step 4\), {number} after it \(step 8\), "
    assert re.fullmatch(pattern + rf"{number} at the end \(step 10\)", losses)
    assert re.match(r"training time: lighthouse \d+\.\d s \(4 steps, .*\), dense \d+\.\d s \(6 steps, ", time)
    assert files == "files: runs/one: final.pt, lighthouse.json"
    assert re.fullmatch(r"curves: \S*tensorboard --logdir runs/one, then http://localhost:6006/#custom_scalars", curves)
    assert re.fullmatch(r"next: \S*lighthouse compare runs/one ANOTHER_RUN --plot curves.png", following)
