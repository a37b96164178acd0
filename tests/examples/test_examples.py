"""The scripts in examples/ on a tiny model: they train over the switch, and a resumed run ends as an unbroken one."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from pretrained import WORDS, load_model, save_model, save_tokenizer

from lightning_lighthouse.attention.windows import chunk_attention
from lightning_lighthouse.routing import calls
from lightning_lighthouse.routing.scope import scopes

pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate: the extra models")

SETTINGS = ["--steps", "4", "--switch_at", "0.5", "--save_steps", "2", "--warmup_steps", "1", "--learning_rate", "0.01"]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model with a tokenizer, and texts of several lengths beside it."""
    monkeypatch.chdir(tmp_path)
    folder = save_model(tmp_path / "model")
    save_tokenizer(Path(folder))
    texts = [" ".join(WORDS * count) for count in (1, 2, 3, 2, 5, 1, 4, 2, 3, 6, 2, 1, 3, 4, 5, 6)]
    Path("texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained_twice(name: str, model: str, *settings: str) -> tuple[Any, Any]:
    """The final model of an unbroken training, and of one that was killed behind its second step and resumed."""
    run = [model, "texts.jsonl", *SETTINGS, *settings]
    example(name).main([*run, "--output", "whole"])
    shutil.copytree("whole/checkpoint-2", "cut/checkpoint-2")
    example(name).main([*run, "--output", "cut", "--resume"])
    assert scopes == []
    return load_model("whole/final"), load_model("cut/final")


def assert_same(one: Any, other: Any, start: Any) -> None:
    parameters = zip(one.parameters(), other.parameters(), start.parameters(), strict=True)
    for ours, theirs, before in parameters:
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, before)


def test_transformers_own_trainer(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = []

    def counted(q: torch.Tensor, *others: Any, **settings: Any) -> torch.Tensor:
        chunks.append(others[2])
        return chunk_attention(q, *others, **settings)

    monkeypatch.setattr(calls, "chunk_attention", counted)
    whole, cut = trained_twice("trainer", model, "--length", "320", "--rope_theta", "50000")
    assert_same(whole, cut, load_model(model))
    # the length that the model was made for, in each of four layers, twice where blocks are computed again, in the two
    # steps before the switch
    assert chunks == [160] * 2 * 4 * 2
    config = whole.config
    assert (config.rope_parameters["rope_theta"], config.max_position_embeddings) == (50000.0, 320)


def test_supervised_fine_tuning_by_trl(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="needs trl")
    seen: list[Any] = []

    def noted(query: torch.Tensor, *others: Any, **settings: Any) -> torch.Tensor:
        seen.append(settings["documents"].lengths)
        return lighthouse(query, *others, **settings)

    lighthouse = calls.lighthouse_attention
    monkeypatch.setattr(calls, "lighthouse_attention", noted)
    whole, cut = trained_twice("sft", model, "--length", "96")
    assert_same(whole, cut, load_model(model))
    # rows of several texts, each of which sees itself alone
    # one of four layers, twice where blocks are computed again, in the two steps before the switch
    assert len(seen) == 2 * 2
    assert all(len(row) > 1 for lengths in seen for row in lengths)
