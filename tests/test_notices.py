"""What the user is told: warnings that can be filtered, and few lines before a training begins."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from places import PACKAGE
from torch import nn

from lightning_lighthouse import LighthouseConfig, LighthouseWarning, lighthouse_attention, notices, patch_attention

FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_every_warning_is_of_our_category(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        is_ours = path.name == "checks.py" or not called.endswith((".warn", "logger.warning", "logger.error"))
        assert is_ours, f"line {node.lineno}: {called} instead of checks.warn"
        if called == "rank_zero_warn":
            assert [ast.unparse(k.value) for k in node.keywords if k.arg == "category"] == ["LighthouseWarning"]


def test_they_are_silenced_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    short = torch.randn(1, 1, 40, 8)
    monkeypatch.setattr(notices, "_given", set())
    with pytest.warns(LighthouseWarning, match="too short"):
        lighthouse_attention(short, short, short)
    monkeypatch.setattr(notices, "_given", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=LighthouseWarning)
        lighthouse_attention(short, short, short)


def test_a_warning_names_the_line_that_asked() -> None:
    class Masked(nn.MultiheadAttention):
        """Never routed: it is given a mask."""

    model = Masked(16, 2, batch_first=True)
    x = torch.randn(1, 64, 16)
    patch = patch_attention(model, LighthouseConfig(2, 2, 8))
    patch.on()
    model(x, x, x, attn_mask=torch.zeros(64, 64), need_weights=False)
    with pytest.warns(LighthouseWarning, match="stayed dense") as caught:
        patch.check("warn")
    patch.restore()
    assert caught[0].filename == __file__


def test_the_command_line_shows_the_sentence_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text " * 99)
    (tmp_path / "b.log").write_text("b")
    code = "import sys; from lightning_lighthouse.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "prepare", "--output_dir", "out", "--seq_len", "32", "--source", "."]
    done = subprocess.run(
        [*command, "--validation_fraction", "0"], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(PACKAGE.parent)},
    )  # fmt: skip
    assert done.stderr.splitlines()[0].startswith("Lighthouse: .: 1 of 2 files are left out, their kind is unknown")
    assert "LighthouseWarning" not in done.stderr


TRAINING = """
import sys, warnings
from lightning.pytorch import Callback, Trainer
from lightning_lighthouse import LighthouseCallback, LighthouseConfig, LighthouseRecipe
from lightning_lighthouse.model import Decoder

class Begin(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 0:
            print("BEGIN", file=sys.stderr, flush=True)

for logger in (True, False):
    data = LighthouseRecipe(seq_len=128, source="a.txt", validation_source="a.txt", output_dir="p", num_workers=0)
    callback = LighthouseCallback(2, LighthouseConfig(2, 2, 8))
    settings = dict(accelerator="cpu", max_steps=3, enable_progress_bar=False, logger=logger)
    trainer = Trainer(**settings, callbacks=[callback, Begin()])
    trainer.fit(Decoder(num_layers=1, dim=16, num_heads=1, ffn_dim=16), datamodule=data)
    print("END", file=sys.stderr, flush=True)
"""


@pytest.mark.slow
def test_a_training_begins_with_one_line(tmp_path: Path) -> None:
    """Also where the data is prepared first; the rest is Lightning's."""
    (tmp_path / "a.txt").write_text("text " * 999)
    done = subprocess.run(
        [sys.executable, "-c", TRAINING], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "sequences" not in done.stdout
    runs = done.stderr.split("END")[:2]
    before = [run.partition("BEGIN")[0].splitlines() for run in runs]
    ours = [[line for line in lines if "ighthouse" in line or "sequences" in line] for lines in before]
    assert [len(lines) for lines in ours] == [1, 1], ours
    assert ours[0][0].startswith(
        "Lighthouse: lighthouse phase from step 0; switch to dense at step 2 of 3; 1 attention"
    )
    assert ours[0][0].endswith("; backend='auto' runs 'reference' on cpu")


def test_what_is_held_is_said_in_the_end(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "lightning_lighthouse"):
        with notices.held_notices() as outer, notices.held_notices() as inner:
            notices.say("of the inner")
            assert inner() == ["of the inner"]
            notices.say("of the outer")
            assert caplog.messages == []
        assert caplog.messages == ["of the outer"]
        assert outer() == []
        notices.say("of nobody")
    assert caplog.messages == ["of the outer", "of nobody"]
