"""What a training left, as a model of transformers: from a run's folder, a checkpoint, final weights, or their own."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from torch import Tensor, nn

from lightning_lighthouse.checks import quoted
from lightning_lighthouse.data.settings import BYTES, DataOptions
from lightning_lighthouse.data.tokenizers import FileTokenizer
from lightning_lighthouse.huggingface.decoder import HuggingFaceDecoder
from lightning_lighthouse.huggingface.llama import byte_tokenizer, llama_of
from lightning_lighthouse.huggingface.reading import (
    is_model,
    is_name,
    materialized,
    read_config,
    read_generation,
    read_tokenizer,
    read_weights,
)
from lightning_lighthouse.model.decoder import Decoder
from lightning_lighthouse.runs import sharded
from lightning_lighthouse.runs.as_data import load_as_data
from lightning_lighthouse.runs.final_weights import FINAL
from lightning_lighthouse.runs.record import REPORT

RECIPE = "config.yaml"
LAST = Path("checkpoints") / "last.ckpt"
# what Lightning calls the model in a checkpoint
STATE = "state_dict"
# a checkpoint lies one folder below its run, a sharded one is a folder itself
LEVELS = 3


@dataclass(frozen=True)
class Trained:
    """A model in memory, and where it comes from.

    Args:
        model: Of transformers, on the CPU, in eval mode.
        tokenizer: Of transformers; None where none is known.
        weights: The file or folder that was read.
        recipe: What the run was told; {} for a model that no run of ours made.
        report: Its `lighthouse.json`; {} where there is none.
    """

    model: Any
    tokenizer: Any
    weights: Path
    recipe: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


def load_trained(path: Path, recipe: Path | None = None) -> Trained:
    """Read what a training left.

    Args:
        path: The folder of a run, a checkpoint of Lightning, a sharded one, `final.pt`, a folder of transformers, a
            name that it can load, or a `.gguf` file.
        recipe: The run's; None: the `config.yaml` beside the weights, or above them.

    Raises:
        ValueError: It holds no such model, or not the one of the recipe.
        FileNotFoundError: There is nothing.
    """
    if is_model(path) or is_name(str(path)):
        return _untrained(path)
    weights = _weights_in(path)
    told = _recipe_of(weights, recipe)
    state = _state_of(weights)
    module = _module_of(told)
    _check_weights(module, state, weights)
    data = (told.get("data") or {}).get("init_args") or {}
    if isinstance(module, Decoder):
        model = llama_of(module, state, _positions_of(told, data))
        tokenizer = _tokenizer_of(told, data)
        if tokenizer is not None:
            model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    else:
        model = materialized(module.config, next(iter(state.values())).dtype)
        model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
        tokenizer = read_tokenizer(module.own_settings["model"])
        model.generation_config = read_generation(module.own_settings["model"]) or model.generation_config
    report = next((file for file in (parent / REPORT for parent in _above(weights)) if file.is_file()), None)
    return Trained(model.eval(), tokenizer, weights, told, {} if report is None else json.loads(report.read_bytes()))


def _untrained(path: Path) -> Trained:
    """A model that no run of ours made, in the type of its weights."""
    config = read_config(str(path))
    dtype = getattr(config, "dtype", None) or torch.float32
    return Trained(read_weights(str(path), config, dtype).eval(), read_tokenizer(str(path)), path)


def _weights_in(path: Path) -> Path:
    if path.is_file() or sharded.is_sharded_checkpoint(path):
        return path
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    for file in (path / FINAL, path / LAST):
        if file.exists():
            return file
    raise ValueError(f"{path} holds neither {FINAL} nor {LAST}, nor the config.json of a model: give a file")


def _above(weights: Path) -> list[Path]:
    """The folders in which what belongs to the run may lie, the nearest first."""
    return list(weights.resolve().parents)[:LEVELS]


def _recipe_of(weights: Path, given: Path | None) -> dict[str, Any]:
    file = given or next((file for file in (parent / RECIPE for parent in _above(weights)) if file.is_file()), None)
    if file is None:
        raise ValueError(f"{weights} has no {RECIPE} beside it, or above it: give the run's recipe with -c")
    try:
        told = yaml.safe_load(file.read_bytes())
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(told, dict):
        raise ValueError(f"{file} is no recipe")
    return told


def _module_of(recipe: Mapping[str, Any]) -> Decoder | HuggingFaceDecoder:
    """The module of a recipe, without its weights."""
    told = recipe.get("model") or {}
    path = told.get("class_path") or "lightning_lighthouse.model.Decoder"
    home, _, name = path.rpartition(".")
    # only ours are imported: a recipe of somebody else's could name anything
    kind = getattr(import_module(home), name, None) if home.startswith("lightning_lighthouse") else None
    settings = dict(told.get("init_args") or {})
    if not isinstance(kind, type) or not issubclass(kind, Decoder | HuggingFaceDecoder):
        raise ValueError(
            "only a Decoder and a HuggingFaceDecoder are known as models of transformers, the recipe has "
            f"{quoted(path)}"
        )
    if issubclass(kind, HuggingFaceDecoder) and settings.get("sequence_length") is None:
        settings["sequence_length"] = ((recipe.get("data") or {}).get("init_args") or {}).get("seq_len")
    with torch.device("meta"):
        module: Decoder | HuggingFaceDecoder = kind(**settings)
    return module


def _state_of(weights: Path) -> dict[str, Tensor]:
    """The state dict of the module, in memory; nothing in a file is run."""
    try:
        if weights.is_dir():
            return sharded.read_weights(weights)
        content = load_as_data(weights)
    except pickle.UnpicklingError:
        raise ValueError(f"{weights} holds more than tensors and plain values: loading it could run code") from None
    state = content.get(STATE, content) if isinstance(content, dict) else {}
    state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not state:
        raise ValueError(f"{weights} holds no weights")
    return state


def _check_weights(module: Decoder | HuggingFaceDecoder, state: Mapping[str, Tensor], weights: Path) -> None:
    """Refuse weights of another model than the recipe's. Raises ValueError."""
    wanted = {name: value.shape for name, value in module.state_dict().items()}
    wrong = [name for name in state if wanted.get(name) != state[name].shape]
    # tied ones may be there once
    alike = {name for name in wanted if name not in state} - _tied(module)
    if wrong or alike:
        name = (wrong or sorted(alike))[0]
        raise ValueError(
            f"{weights} holds the weights of another model than its recipe's: {name} is "
            f"{list(state[name].shape) if name in state else 'not there'}, "
            f"and there {list(wanted[name]) if name in wanted else 'not known'}; give the run's recipe with -c"
        )


def _tied(module: nn.Module) -> set[str]:
    """Names of parameters that have another one too."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for same in names.values() if len(same) > 1 for name in same}


def _is_recipe(told: Mapping[str, Any]) -> bool:
    """Whether the data is a `LighthouseRecipe`, whose defaults are known."""
    path = (told.get("data") or {}).get("class_path")
    return path is None or str(path).rpartition(".")[2] == "LighthouseRecipe"


def _positions_of(told: Mapping[str, Any], data: Mapping[str, Any]) -> int:
    """Tokens of the sequences that a run was trained on."""
    length = data.get("seq_len", DataOptions.seq_len if _is_recipe(told) else None)
    if not isinstance(length, int):
        raise ValueError("the recipe does not say the length of the sequences: give one with data.init_args.seq_len")
    return length


def _tokenizer_of(told: Mapping[str, Any], data: Mapping[str, Any]) -> Any:
    """That of the data: bytes, a `tokenizer.json`, or a folder of transformers; None where it is not known."""
    name = data.get("tokenizer")
    if name == BYTES or (name is None and _is_recipe(told)):
        return byte_tokenizer()
    path = Path(str(name))
    if path.is_dir():
        return read_tokenizer(str(path))
    if name is None or not path.is_file():
        return None
    from transformers import PreTrainedTokenizerFast

    known = FileTokenizer(str(path), data.get("end_of_document"))
    end = next(name for name, number in known.vocabulary.items() if number == known.end_of_document)
    return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token=end)
