"""Names in a recipe that would lead out of the folder they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonargparse import Namespace


def strays(config: Namespace) -> Iterator[str]:
    """One line for each name of a logger, of a checkpoint or of a callback's file that leaves its folder.

    Args:
        config: The settings of one command, parsed.
    """
    for key, name, folder in _names(config):
        # a link may lead out as well
        if isinstance(name, str) and (
            ".." in Path(name).parts or not (folder / name).resolve().is_relative_to(folder.resolve())
        ):
            yield f"{key} must stay inside its folder, got {name!r}"


def classes(key: str, value: Any) -> Iterator[tuple[str, Namespace]]:
    """The key and the init_args of each class that a value names: one, or a list of them."""
    numbered = [(f"{key}[{i}]", item) for i, item in enumerate(value)] if isinstance(value, list) else [(key, value)]
    for name, item in numbered:
        arguments = getattr(item, "init_args", None)
        if isinstance(arguments, Namespace):
            yield f"{name}.init_args", arguments


def _names(config: Namespace) -> Iterator[tuple[str, Any, Path]]:
    """Every such name with its key and its folder."""
    for key, logger in classes("trainer.logger", config.get("trainer.logger")):
        runs = Path(str(logger.get("save_dir") or "."))
        run = runs / str(logger.get("name") or "")
        yield f"{key}.name", logger.get("name"), runs
        yield f"{key}.version", logger.get("version"), run
        yield f"{key}.sub_dir", logger.get("sub_dir"), run / str(logger.get("version") or "version")
    for key, group in [("checkpoint", config.checkpoint), *classes("trainer.callbacks", config.trainer.callbacks)]:
        yield f"{key}.filename", group.get("filename"), Path(str(group.get("dirpath") or "."))
