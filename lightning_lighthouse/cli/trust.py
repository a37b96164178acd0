"""Recipes from others: `--trusted_classes_only` refuses classes that are not this package's or Lightning's.

A recipe is code, for it may name any class, and Python imports the class's module. The names are compared before
anything is imported; jsonargparse, which imports them, is told to refuse as well.
"""

from __future__ import annotations

import collections.abc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from jsonargparse import Namespace, set_parsing_settings

from lightning_lighthouse.checks import quoted
from lightning_lighthouse.cli.recipe import TRUSTED_ONLY, Section, UsageError

TRUSTED_PACKAGES = ("lightning_lighthouse", "lightning")
RULE = f"must be a class of {' or '.join(TRUSTED_PACKAGES)} with {TRUSTED_ONLY}"


def deny_imports() -> None:
    """Let jsonargparse import from the trusted packages alone, for the rest of the process."""
    try:
        set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=list(TRUSTED_PACKAGES))
    except TypeError:
        raise UsageError(f"{TRUSTED_ONLY} needs a newer jsonargparse: pip install -U jsonargparse") from None


def is_trusted(path: str) -> bool:
    """Whether an import path lies in a trusted package. A name without a dot is one of a class known already."""
    return "." not in path or path.split(".")[0] in TRUSTED_PACKAGES


def untrusted_classes(value: Any, key: str = "", where: str = "") -> Iterator[tuple[str, str]]:
    """Every class_path in a recipe, however deep, that is not trusted.

    Args:
        value: The recipe, or a part of it.
        key: Its dotted key.
        where: Its place.

    Returns:
        Place and problem of each.
    """
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from untrusted_classes(item, f"{key}[{number}]", where)
    if not isinstance(value, Section):
        return
    for name, item in value.items():
        full = f"{key}.{name}" if key else name
        if name == "class_path" and not (isinstance(item, str) and is_trusted(item)):
            yield value.where[name], f"{full} {RULE}, got {quoted(item)}"
        else:
            yield from untrusted_classes(item, full, value.where[name])


def names_code(hint: Any) -> bool:
    """Whether a string can stand for a function or a class in a type, to be imported."""
    origin = get_origin(hint) or hint
    return origin in (type, collections.abc.Callable) or any(names_code(part) for part in get_args(hint))


def strings_in(value: Any) -> Iterator[str]:
    """All strings in a value, keys apart."""
    if isinstance(value, str):
        yield str(value)
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings_in(item)


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
            yield f"{key} must stay inside its folder, got {quoted(name)}"


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
