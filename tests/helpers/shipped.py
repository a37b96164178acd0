"""The recipes that ship, and the small pretrained models that stand in for those they name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pretrained import save_model, save_tokenizer


def models(path: Path) -> dict:
    """The settings of a recipe's model."""
    return yaml.safe_load(path.read_text()).get("model", {})


def is_pretrained(path: Path) -> bool:
    return models(path).get("class_path", "").endswith("HuggingFaceDecoder")


def save_base(path: Path) -> None:
    """Save the pretrained model that a recipe names, where it names one, in the current folder."""
    if is_pretrained(path):
        pytest.importorskip("transformers", reason="needs the extra hf")
        # which reaches as far as those that the recipes are written for
        reach = {"max_position_embeddings": 8192, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}
        save_model(Path(models(path)["init_args"]["model"]), **reach)
        save_tokenizer(Path(models(path)["init_args"]["model"]))
