"""The recipes that ship, and the small pretrained models that stand in for those they name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pretrained import save_model, save_tokenizer


def models(path: Path) -> dict:
    """The settings of a recipe's model."""
    return yaml.safe_load(path.read_text()).get("model", {})


def is_pretrained(path: Path) -> bool:
    return models(path).get("class_path", "").endswith("HuggingFaceDecoder")


# Those of the models that the recipes are written for
REACH = {"max_position_embeddings": 8192, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}


def save_base(path: Path, **settings: Any) -> None:
    """Save the pretrained model that a recipe names, where it names one, in the current folder: a tiny one."""
    if is_pretrained(path):
        pytest.importorskip("transformers", reason="needs the extra hf")
        save_model(Path(models(path)["init_args"]["model"]), **settings)
        save_tokenizer(Path(models(path)["init_args"]["model"]))
