"""Recipes from others: `--trusted_classes_only` refuses classes that are not this package's or Lightning's.

A recipe is code, for it may name any class, and Python imports the class's module. The names are compared before
anything is imported; jsonargparse, which imports them, is told to refuse as well.
"""

from __future__ import annotations

import collections.abc
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from jsonargparse import set_parsing_settings

from lightning_lighthouse.cli_recipe import TRUSTED_ONLY, Section, UsageError

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
            yield value.where[name], f"{full} {RULE}, got {item!r}"
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
