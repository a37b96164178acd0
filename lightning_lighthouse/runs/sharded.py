"""Checkpoints that torch.distributed wrote: a folder, in which each rank left its part."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from dataclasses import is_dataclass
from enum import Enum
from importlib import import_module
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from lightning_lighthouse.runs.as_data import load_as_data, unreadable
from lightning_lighthouse.runs.final_weights import is_sharded

# torch's table of contents, and what Lightning writes beside it: all that is no tensor
CONTENTS, OTHERS = ".metadata", "meta.pt"
# what Lightning calls the model in it, under FSDP2 and under FSDP1
PREFIXES = ("state_dict.", "model.")
# where what stands in a table of contents is defined
HOMES = (
    *(f"torch.distributed.checkpoint.{name}" for name in ("metadata", "filesystem")),
    *("torch", "pathlib", "pathlib._local"),
)
LAYOUT = ("torch.serialization", "_get_layout")


def is_sharded_checkpoint(path: Path) -> bool:
    """Whether a path is such a folder."""
    return (path / CONTENTS).is_file()


def step_of(folder: Path) -> int | None:
    """Optimizer steps of a checkpoint, None where it does not say."""
    if not (folder / OTHERS).is_file():
        return None
    told = load_as_data(folder / OTHERS)
    step = told.get("global_step") if isinstance(told, Mapping) else None
    return step if isinstance(step, int) else None


def check_contents(folder: Path) -> Metadata:
    """The table of contents, read as data: torch's own reader would run what code is planted in it.

    Raises:
        UnpicklingError: It holds more than values.
        ValueError: It is broken.
    """
    path = folder / CONTENTS
    try:
        with path.open("rb") as file:
            contents = _Contents(file).load()
    except _PlantedError:
        raise
    # whatever pickle raises on what is none
    except Exception as error:
        raise unreadable(path, error) from error
    if not isinstance(contents, Metadata):
        raise ValueError(f"{path} is no table of contents of a sharded checkpoint, but {type(contents).__name__}")
    return contents


class _PlantedError(pickle.UnpicklingError):
    """A name that stands for more than values."""


class _Contents(pickle.Unpickler):
    """Makes nothing but the records of torch.distributed.checkpoint, and what stands in them."""

    def find_class(self, module: str, name: str) -> Any:
        # a dot would reach what a module has imported
        found: Any = getattr(import_module(module), name, None) if module in HOMES and "." not in name else None
        if isinstance(found, type):
            is_record = found.__module__ == module and (is_dataclass(found) or issubclass(found, Enum))
            is_plain = is_record or issubclass(found, PurePath | torch.Size)
        else:
            is_plain = isinstance(found, torch.dtype) or (module, name) == LAYOUT
        if is_plain:
            return super().find_class(module, name)
        # as torch.load names it
        raise _PlantedError(f"Unsupported global: GLOBAL {module}.{name}")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The whole model of a checkpoint, in memory, without what the optimizer kept."""
    prefix, entries = _entries(folder)
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    _read_into(state, prefix, folder, no_dist=True)
    return state


def load_weights(folder: Path, module: nn.Module) -> None:
    """Bring the weights of a checkpoint into a model, each rank its part.

    Args:
        folder: Written by however many ranks.
        module: Sharded or whole; every rank calls this where it is sharded.

    Raises:
        ValueError: They are those of another model.
    """
    prefix, entries = _entries(folder)
    is_shared = is_sharded(module)
    state = get_model_state_dict(module) if is_shared else module.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    _require_fit(tensors, entries, folder)
    # in place: these are the tensors of the model
    _read_into(tensors, prefix, folder, no_dist=not is_shared)


def _read_into(tensors: Mapping[str, Tensor], prefix: str, folder: Path, *, no_dist: bool) -> None:
    with warnings.catch_warnings():
        # that one process reads all
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        try:
            load({prefix + name: value for name, value in tensors.items()}, checkpoint_id=folder, no_dist=no_dist)
        # no Exception, so that nobody else would tell it
        except CheckpointException as error:
            raise unreadable(folder, next(iter(error.failures.values()))[0]) from error


def _entries(folder: Path) -> tuple[str, dict[str, TensorStorageMetadata]]:
    """The prefix of the model's tensors, and what there is of them."""
    contents = check_contents(folder).state_dict_metadata
    tensors = {name: entry for name, entry in contents.items() if isinstance(entry, TensorStorageMetadata)}
    prefix = next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in tensors)), None)
    if prefix is None:
        raise ValueError(f"checkpoint {folder} holds no model")
    return prefix, {name.removeprefix(prefix): entry for name, entry in tensors.items() if name.startswith(prefix)}


def _require_fit(tensors: Mapping[str, Tensor], entries: Mapping[str, TensorStorageMetadata], folder: Path) -> None:
    problems = [
        *(f"it has no {name}" for name in tensors if name not in entries),
        *(f"the model has no {name}" for name in entries if name not in tensors),
        *(
            f"{name} is {list(entries[name].size)} and not {list(value.shape)}"
            for name, value in tensors.items()
            if name in entries and entries[name].size != value.shape
        ),
    ]
    if problems:
        and_more = f", and {len(problems) - 1} more such" if len(problems) > 1 else ""
        raise ValueError(f"checkpoint {folder} does not fit the model: {problems[0]}{and_more}")
