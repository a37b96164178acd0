"""What does not fit the model's layers: refused by `check`, `plan` and `fit` alike, before any data is prepared."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_parts import refusal

SMALL = """\
trainer: {accelerator: cpu, max_steps: 9}
lighthouse: {attention: {num_levels: 2, pooling_factor: 2, top_k: 8}}
model: {init_args: {num_layers: 4, dim: 16, num_heads: 2, ffn_dim: 16}}
data: {init_args: {seq_len: 128, source: text.txt, output_dir: prepared, num_workers: 0}}
"""
FIVE = "[window, window, window, window, lighthouse]"
HAS = "names 5 layers, the model has 4 attention layers"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(SMALL)
    Path("text.txt").write_text("The river and the stone. " * 200)


@pytest.mark.parametrize("command", [("check", "recipe.yaml"), ("plan", "recipe.yaml"), ("fit", "-c", "recipe.yaml")])
@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ((f"--lighthouse.layer_types={FIVE}", "--lighthouse.window", "8"), f"lighthouse.layer_types {HAS}"),
        (
            (f"--lighthouse.phases=[{{until: 0.2}}, {{until: 0.5, layer_types: {FIVE}, window: 8}}]",),
            f"lighthouse.phases[1].layer_types {HAS}",
        ),
        (
            ("--lighthouse.phases=[{until: 0.5, attention: {num_levels: 40}}]",),
            "lighthouse: a pyramid over 128 tokens with num_levels=40",
        ),
    ],
)
def test_types_of_more_layers_than_the_model_has_are_refused_before_data_is_prepared(capsys, command, flags, line):
    # that leaves no folder of data either
    assert refusal(capsys, *command, *flags).startswith(line)
