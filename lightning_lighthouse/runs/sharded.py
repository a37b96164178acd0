"""Checkpoints that torch.distributed wrote: a folder, in which each rank left its part."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from lightning_lighthouse.runs.final_weights import is_sharded

# torch's table of contents, and what Lightning writes beside it: all that is no tensor
CONTENTS, OTHERS = ".metadata", "meta.pt"
# what Lightning calls the model in it, under FSDP2 and under FSDP1
PREFIXES = ("state_dict.", "model.")


def is_sharded_checkpoint(path: Path) -> bool:
    """Whether a path is such a folder."""
    return (path / CONTENTS).is_file()


def step_of(folder: Path) -> int | None:
    """Optimizer steps of a checkpoint, None where it does not say."""
    if not (folder / OTHERS).is_file():
        return None
    step = torch.load(folder / OTHERS, map_location="cpu", weights_only=True).get("global_step")
    return step if isinstance(step, int) else None


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
        load({prefix + name: value for name, value in tensors.items()}, checkpoint_id=folder, no_dist=no_dist)


def _entries(folder: Path) -> tuple[str, dict[str, TensorStorageMetadata]]:
    """The prefix of the model's tensors, and what there is of them."""
    contents = FileSystemReader(folder).read_metadata().state_dict_metadata
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
