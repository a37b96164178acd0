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
