"""Recipes and flags, checked key by key before anything is built: every mistake becomes one line.

A parser's own message for a wrong key names neither the nearest key nor, inside a class, where the key stands; for a
union it runs over fifteen lines. So each key given in a file or as a flag is looked up here in the parser that will
read it, and each value is tried alone against that key's type. What passes is then parsed for good in `fit`.
"""

from __future__ import annotations

import importlib
import traceback
import types
from argparse import SUPPRESS, Action, ArgumentError
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from enum import EnumType
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentParser, Namespace

from lightning_lighthouse.checks import quoted, shown
from lightning_lighthouse.cli.recipe import Raw, Section, UsageError, load, located, nearest, plain
from lightning_lighthouse.cli.trust import RULE, is_trusted, names_code, strings_in, untrusted_classes

# A recipe writes this where only the user knows the value
REQUIRED = "???"
# A longer list of keys does not fit in a line; `lighthouse fit --help.all` shows it
LISTED_KEYS = 16
SPEC_KEYS = ("class_path", "init_args", "dict_kwargs")


class Checker:
    """Compares what was given with what a parser knows.

    Args:
        parser: The parser of one command.
        trusted_only: Whether a class must be this package's or Lightning's.
    """

    def __init__(self, parser: ArgumentParser, *, trusted_only: bool = False) -> None:
        self.parser = parser
        self.trusted_only = trusted_only
        self.problems: list[str] = []
        # dotted key -> where a recipe asks the user for its value
        self.required: dict[str, str] = {}
        self.given: set[str] = set()
        # dotted keys of lists of mappings, in the order in which they are given
        self.lists: list[str] = []
        # a flag's text while it is checked, and why it is no YAML
        self._text: Raw | None = None
        self._unreadable = ""
        self.classes: dict[str, type] = {}
        for key, action in _known(parser).items():
            default = action.default
            if class_path := getattr(default, "class_path", None):
                self.classes[key] = _import(class_path, ())
                self.given.update(
                    f"{key}.init_args.{name}" for name in vars(getattr(default, "init_args", Namespace()))
                )

    def recipe(self, recipe: Section) -> dict[str, Any]:
        """Check a file; return it without the keys that are wrong."""
        return self._trusted_section(recipe)

    def flag(self, key: str, text: Raw) -> dict[str, Any]:
        """Check a flag; return it as nested mappings, empty if it is wrong."""
        value: Any = text
        self._text, self._unreadable = text, ""
        if text.lstrip()[:1] in ("{", "["):
            try:
                value = load(text)
            except UsageError as error:
                self._unreadable = str(error)
        # `--trainer.callbacks+` appends to a list
        parts = key.removesuffix("+").split(".")
        # `--model.dim` is short for `--model.init_args.dim`
        for size in range(len(parts) - 1, 0, -1):
            if ".".join(parts[:size]) in self.classes and parts[size] not in SPEC_KEYS:
                parts.insert(size, "init_args")
        for part in reversed(parts):
            value = Section.of(part, value)
        try:
            return self._trusted_section(value)
        finally:
            self._text, self._unreadable = None, ""

    def missing(self) -> None:
        """Note the values that were asked for and not given."""
        for path, cls in self.classes.items():
            for name, action in _known(_class_parser(cls)).items():
                if action.required and f"{path}.init_args.{name}" not in self.given:
                    self.required[f"{path}.init_args.{name}"] = ""
        for key, where in self.required.items():
            self._note(where, f"{key} is required; give --{key} VALUE, or write it in the recipe")

    def _trusted_section(self, section: Section) -> dict[str, Any]:
        untrusted = list(untrusted_classes(section)) if self.trusted_only else []
        for where, problem in untrusted:
            self._note(where, problem)
        # to look closer would import what is not trusted
        return {} if untrusted else self._section(section, self.parser, "")

    def _note(self, where: str, problem: str) -> None:
        self.problems.append(located(where, problem))

    def _section(self, section: Section, parser: ArgumentParser, prefix: str, under: str = "") -> dict[str, Any]:
        """Check the keys of `section` against those of `parser` that begin with `under`; `prefix` is for messages."""
        known = _known(parser)
        good: dict[str, Any] = {}
        for key, value in section.items():
            name, full, where = under + key, prefix + key, section.where[key]
            if name in known:
                good.update(self._leaf(key, value, known[name], full, where))
            elif any(other.startswith(name + ".") for other in known):
                if isinstance(value, Section):
                    good[key] = self._section(value, parser, full + ".", name + ".")
                elif not isinstance(value, str) or isinstance(value, Raw) or self.trusted_only:
                    # a plain string may name a file that holds the group
                    self._note(where, f"{full} must be a group of keys, got {quoted(value)}")
            else:
                siblings = sorted({other[len(under) :].split(".")[0] for other in known if other.startswith(under)})
                self._unknown(full, key, siblings, where)
        return good

    def _unknown(self, full: str, key: str, siblings: Sequence[str], where: str) -> None:
        listed = f" (known: {', '.join(siblings)})" if len(siblings) <= LISTED_KEYS else ""
        self._note(where, f"{full} is not a known key{nearest(key, siblings)}{listed}")

    def _leaf(self, key: str, value: Any, action: Action, full: str, where: str) -> dict[str, Any]:
        """Check one value; return it under its key, or nothing."""
        self.given.add(full)
        if value == REQUIRED:
            self.required[full] = where
            return {}
        self.required.pop(full, None)
        hint = getattr(action, "_typehint", action.type)
        bases = tuple(_classes(hint))
        if isinstance(value, list) and any(isinstance(item, Section) for item in value):
            self.lists.append(full)
        if self.trusted_only and (untrusted := self._untrusted_name(value, hint, bases)):
            self._note(where, f"{full} {RULE}, got {quoted(untrusted)}")
            return {}
        records = [base for base in bases if is_dataclass(base)]
        items = value if isinstance(value, list) else [value]
        if records and all(isinstance(item, Section) and not set(item) & set(SPEC_KEYS) for item in items):
            numbered = [f"{full}[{i}]" for i in range(len(items))] if isinstance(value, list) else [full]
            count = len(self.problems)
            good = [self._record(item, records[0], name) for item, name in zip(items, numbered, strict=True)]
            # built without what is wrong in it, it would be wrong in another way
            return {} if len(self.problems) > count else {key: good if isinstance(value, list) else good[0]}
        if isinstance(value, Section) and bases and (set(value) & set(SPEC_KEYS) or full in self.classes):
            return {key: self._spec(value, bases, full)}
        if isinstance(value, list) and bases and any(isinstance(item, Section) for item in value):
            specs = enumerate(value)
            return {key: [self._spec(x, bases, f"{full}[{i}]") if isinstance(x, Section) else x for i, x in specs]}
        no_class = _why_no_class(value, bases) if isinstance(value, str) and bases else ""
        if isinstance(value, str) and bases and not no_class:
            # the import path alone, without class_path
            return {key: self._spec(Section.of("class_path", value), bases, full)}
        problem = refusal(value, hint)
        if problem and self._text is not None and not refusal(self._text, hint):
            # a name may begin with a bracket
            return {key: str(self._text)}
        if problem:
            self._note(where, f"{full} {self._unreadable or no_class or problem}")
            return {}
        return {key: plain(value)}

    def _untrusted_name(self, value: Any, hint: Any, bases: tuple[type, ...]) -> str:
        """A string in a value that a parser would import, and that is not trusted; else nothing."""
        if names_code(hint):
            # which function of a trusted package does no harm is not known
            return next((text for text in strings_in(value) if "." in text), "")
        items = value if isinstance(value, list) else [value]
        return next((text for text in items if bases and isinstance(text, str) and not is_trusted(text)), "")

    def _record(self, section: Section, record: type, full: str) -> dict[str, Any]:
        """Check a mapping that stands for a dataclass."""
        count = len(self.problems)
        good = self._section(section, _class_parser(record), f"{full}.")
        missing = [name for name, action in _known(_class_parser(record)).items() if action.required]
        where = next(iter(section.where.values()), "")
        for name in missing:
            if name not in section:
                self._note(where, f"{full}.{name} is required")
        if len(self.problems) == count:
            try:
                record(**_values(section, record))
            except (ValueError, TypeError) as error:
                name = str(error).partition(" ")[0]
                self._note(section.where.get(name, where), f"{full}.{error}")
        return good

    def _spec(self, spec: Section, bases: tuple[type, ...], full: str) -> dict[str, Any]:
        """Check `class_path` and `init_args`."""
        good: dict[str, Any] = {}
        for key in spec:
            if key not in SPEC_KEYS:
                self._unknown(f"{full}.{key}", key, SPEC_KEYS, spec.where[key])
        if "class_path" in spec:
            good["class_path"] = str(spec["class_path"])
            self.classes.pop(full, None)
            if problem := _why_no_class(good["class_path"], bases):
                self._note(spec.where["class_path"], f"{full}.class_path {problem}")
                return {}
            self.classes[full] = _import(good["class_path"], bases)
        init_args = spec.get("init_args")
        if isinstance(init_args, Section) and full in self.classes:
            good["init_args"] = self._section(init_args, _class_parser(self.classes[full]), f"{full}.init_args.")
        return good


def _values(section: Section, record: type) -> dict[str, Any]:
    """The fields of a dataclass as the parser that builds it reads them: `1e-4` in a recipe, text in a flag."""
    flags = {name: value for name, value in section.items() if isinstance(value, Raw)}
    parser = _class_parser(record)
    values = vars(parser.parse_object({name: plain(value) for name, value in section.items() if name not in flags}))
    if flags:
        # the parser would miss what the recipe gives
        given = vars(parser.parse_args([f"--{name}={value}" for name, value in flags.items()]))
        values |= {name: given[name] for name in flags}
    kinds = {
        action.dest: tuple(_classes(action._typehint)) for action in parser._actions if hasattr(action, "_typehint")
    }
    return {name: _built(value, kinds.get(name, ())) for name, value in values.items()}


def _built(value: Any, kinds: Sequence[type]) -> Any:
    """A dataclass within a dataclass, which the parser leaves as a mapping."""
    record = next((kind for kind in kinds if is_dataclass(kind)), None)
    return record(**vars(value)) if record is not None and isinstance(value, Namespace) else value


def _known(parser: ArgumentParser) -> dict[str, Action]:
    """The keys that hold a value, groups and `--help` apart."""
    return {a.dest: a for a in parser._actions if a.default != SUPPRESS and a.dest != "config"}


def _class_parser(cls: type) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, fail_untyped=False, sub_configs=True)
    return parser


def refusal(value: Any, hint: Any) -> str:
    """What a value must be and what it is, or nothing if it fits the type."""
    if hint is None:
        return ""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        if isinstance(value, Raw):
            parser.parse_args([f"--value={value}"])
        else:
            parser.parse_object({"value": plain(value)})
    except ArgumentError:
        options = [str(option) for option in _options(hint)]
        words = _describe(hint)
        allowed = f"one of {', '.join(words)}" if len(words) > 3 else " or ".join(words)
        return f"must be {allowed}, got {_shown(value)}{nearest(str(value), options)}"
    return ""


def _shown(value: Any) -> str:
    return "null" if value is None else shown(repr(plain(value)))


def _options(hint: Any) -> Iterator[Any]:
    """The values of every Literal and Enum in a type."""
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    elif isinstance(hint, EnumType):
        yield from hint.__members__
    else:
        for part in get_args(hint):
            yield from _options(part)


def _describe(hint: Any) -> list[str]:
    """A type in the words of a recipe."""
    if hint is type(None):
        return ["null"]
    origin = get_origin(hint)
    if origin is Literal or isinstance(hint, EnumType):
        return [repr(option) for option in _options(hint)]
    if origin in (Union, types.UnionType):
        words = [word for part in get_args(hint) for word in _describe(part)]
        return list(dict.fromkeys(words))
    if origin is not None:
        parts = [" or ".join(_describe(part)) for part in get_args(hint) if part is not ...]
        return [f"{origin.__name__.lower()} of {', '.join(parts)}"]
    return [getattr(hint, "__name__", str(hint))]


def _classes(hint: Any) -> Iterator[type]:
    """The classes in a type that a recipe gives as class_path and init_args."""
    if isinstance(hint, type) and get_origin(hint) is None:
        if hint.__module__ not in ("builtins", "pathlib", "datetime") and not isinstance(hint, EnumType):
            yield hint
    else:
        for part in get_args(hint):
            yield from _classes(part)


def _import(class_path: str, bases: tuple[type, ...]) -> type:
    """The class of that path, or of that name among the subclasses of `bases`. Raises ImportError if there is none."""
    module_name, dot, name = class_path.rpartition(".")
    if not dot:
        subclasses = {cls.__name__: cls for base in bases for cls in _subclasses(base)}
        if name not in subclasses:
            raise ImportError(nearest(name, list(subclasses)))
        return subclasses[name]
    try:
        module = importlib.import_module(module_name)
    # its own code runs, and may raise anything; ValueError and TypeError also for dots in the wrong place
    except Exception as error:
        raise ImportError(f": {_described(error)}") from error
    if not hasattr(module, name):
        raise ImportError(nearest(name, dir(module)))
    found = getattr(module, name)
    if not isinstance(found, type) or (bases and not issubclass(found, bases)):
        raise ImportError(", which is none")
    return found


def _described(error: Exception) -> str:
    """What an import raised, and where in the module's own code."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    others = (__file__, importlib.__file__)
    own = [frame for frame in frames if not frame.filename.startswith("<frozen ") and frame.filename not in others]
    where = f"{own[-1].filename}:{own[-1].lineno}: " if own else ""
    return f"{where}{error}" if isinstance(error, ImportError) else f"{where}{type(error).__name__}: {error}"


def _why_no_class(class_path: str, bases: tuple[type, ...]) -> str:
    """What a class path must be and what it is, or nothing if it is one."""
    try:
        _import(class_path, bases)
    except ImportError as error:
        kinds = " or ".join(base.__name__ for base in bases)
        return f"must be the import path of a {kinds}, got {quoted(str(class_path))}{error}"
    return ""


def _subclasses(base: type) -> Iterator[type]:
    yield base
    subclasses: list[type] = base.__subclasses__()
    for subclass in subclasses:
        yield from _subclasses(subclass)
