"""Recipes and flags as they are given, each key with its place.

YAML is read with the safe loader, and stricter than jsonargparse reads it: a key that is given twice is refused, not
overwritten. One mistake is one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import yaml  # type: ignore[import-untyped]

from lightning_lighthouse.checks import quoted

TRUSTED_ONLY = "--trusted_classes_only"
# every option; `--help` shows those that people set
HELP_ALL = "--help.all"
# Options that take no value
SWITCHES = ("--print_config", TRUSTED_ONLY)


def nearest(name: str, names: Sequence[str]) -> str:
    """`; did you mean ...?`, or nothing if no name is near."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def asks_help(arguments: Sequence[str]) -> bool:
    """Whether arguments ask for help, of a command or of a class."""
    return any(item in ("-h", "--help", HELP_ALL) or item.partition("=")[0].endswith(".help") for item in arguments)


class UsageError(Exception):
    """Mistakes in the arguments or in a recipe.

    Args:
        problems: One line for each.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Section(dict[str, Any]):
    """A mapping that remembers where each of its keys was given: `recipe.yaml:12`, or nothing for a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.where: dict[str, str] = {}

    def put(self, key: str, value: Any, where: str) -> None:
        """Set one key."""
        self[key] = value
        self.where[key] = where

    @classmethod
    def of(cls, key: str, value: Any) -> Section:
        """A section of one key, given by a flag."""
        section = cls()
        section.put(key, value, "")
        return section


class Raw(str):
    """The text of a flag's value, not yet read as YAML."""


def plain(value: Any) -> Any:
    """The value in Python's own types."""
    if isinstance(value, Section):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Raw) else value


def located(where: str, problem: str) -> str:
    """A problem with its place in front, if it has one."""
    return f"{where}: {problem}" if where else problem


def load(text: str, file: str = "") -> Any:
    """Read YAML with the safe loader; mappings become sections.

    Args:
        text: The YAML.
        file: Its name, for the places in messages; empty for the value of a flag.

    Raises:
        UsageError: The text is not YAML, uses a tag or gives a key twice.
    """

    def section(loader: yaml.SafeLoader, node: yaml.MappingNode) -> Section:
        keys = Section()
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in lines:
                problem = f"{key} is given again, first in line {lines[key]}; keep one"
                raise UsageError(located(f"{file}:{line}" if file else "", problem))
            lines[key] = line
        # puts the keys of `<<` first: the section's own come later and win
        loader.flatten_mapping(node)
        for key_node, value_node in node.value:
            key = str(key_node.value)
            where = f"{file}:{key_node.start_mark.line + 1}" if file else ""
            keys.put(key, loader.construct_object(value_node, deep=True), where)
        return keys

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, section)
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{file}:{mark.line + 1}" if file and mark else file
        hint = "; indent with spaces, not tabs" if "'\\t'" in str(error.problem) else ""
        raise UsageError(located(where, f"not readable as YAML: {error.problem}{hint}")) from error
    # ValueError, RecursionError: a value that looks like a date or a number and is none; brackets without end
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(located(file, f"not readable as YAML: {' '.join(str(error).split())}")) from error


def read(file: str) -> Section:
    """Read a recipe. Raises UsageError where it cannot be read, is not YAML or not a mapping."""
    try:
        with open(file, encoding="utf-8") as stream:
            recipe = load(stream.read(), file)
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: cannot be read: not UTF-8 text") from error
    if not isinstance(recipe, Section):
        kind = "nothing" if recipe is None else type(recipe).__name__
        raise UsageError(f"{file}: a recipe must be a mapping of keys to values, got {kind}")
    return recipe


def split_own(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments of a command of its own, and the flags with a dot, which are the recipe's."""
    own: list[str] = []
    overrides: list[str] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        key, equals, _ = argument.partition("=")
        if argument.startswith("--") and "." in key:
            overrides += [argument] if equals or not rest else [argument, rest.pop(0)]
        else:
            own.append(argument)
    return own, overrides


def split(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, Raw]]]:
    """Sort the arguments after a command into recipes and flags.

    Args:
        arguments: For example `-c recipe.yaml --trainer.max_steps 10`.

    Returns:
        The files of `-c` and `--config`, and (key, text) of every other flag, each in the order given.

    Raises:
        UsageError: A flag without a value, or a value without a flag.
    """
    files, flags = [], []
    rest = list(arguments)
    while rest:
        flag, equals, text = rest.pop(0).partition("=")
        if flag == TRUSTED_ONLY and equals:
            raise UsageError(f"{flag} takes no value, got {quoted(text)}")
        if flag in SWITCHES:
            continue
        if flag != "-c" and not flag.startswith("--"):
            raise UsageError(
                f"unexpected argument {quoted(flag)}; a recipe is given as -c FILE, a value as --KEY VALUE"
            )
        if not equals:
            if not rest or rest[0].startswith("--") or rest[0] == "-c":
                raise UsageError(f"{flag} needs a value: {flag} VALUE")
            text = rest.pop(0)
        if flag in ("-c", "--config"):
            files.append(text)
        else:
            flags.append((flag.removeprefix("--"), Raw(text)))
    return files, flags
