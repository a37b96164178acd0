"""Documents from the places where text lies: text files, JSONL, tables, or Python's own standard library.

`find_files` lists the files of a source in a fixed order, `read_documents` walks through them. A document is UTF-8
bytes; its text is never normalised or trimmed.
"""

from __future__ import annotations

import codecs
import glob
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lightning_lighthouse.checks import quoted, shown, warn
from lightning_lighthouse.data.preparing.kinds import KNOWN, is_known, kind_of, read_lines, read_text
from lightning_lighthouse.data.preparing.tables import find_table_files, read_table

# Tests of the standard library hold generated tables and broken code on purpose, and installed packages are not its own
STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Document(NamedTuple):
    """One document.

    Args:
        text: UTF-8 bytes.
        origin: File, and line or row: for messages.
        bytes_read: Bytes of the file read since the document before: for the progress bar.
    """

    text: bytes
    origin: str
    bytes_read: int


def find_files(source: str | None) -> list[Path]:
    """The files of a source, sorted by path.

    Args:
        source: A file, a folder (all files of known kinds beneath it, or those of a data set that Hugging Face's
            `datasets` saved), or a glob pattern (all files that match). None: the source files of Python's standard
            library.

    Returns:
        At least one file.

    Raises:
        FileNotFoundError: There is nothing to read.
    """
    if source is None:
        root = Path(sysconfig.get_path("stdlib"))
        found = [path for path in root.rglob("*.py") if STDLIB_LEFT_OUT.isdisjoint(path.relative_to(root).parts)]
        return _sorted(found, root)
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir() and (tables := find_table_files(path)):
        return tables
    if path.is_dir():
        files = [file for file in _walk(path) if not _hidden(file, path)]
        known = [file for file in files if is_known(file)]
        left_out = sorted(set(files) - set(known))
        if left_out and known:
            warn(
                f"{source}: {len(left_out)} of {len(files)} files are left out, their kind is unknown (first: "
                f"{left_out[0].name}); a pattern such as '{source}/**/*{left_out[0].suffix}' reads them as text"
            )
        if not known:
            raise FileNotFoundError(
                f"source {source} holds no file of a known kind ({KNOWN}); name other text files by "
                f"a pattern: '{source}/**/*'"
            )
        return _sorted(known, path)
    matches = [match for match in _matches(path) if match.is_file()]
    if not matches:
        raise FileNotFoundError(
            f"source must be a file, a folder or a glob pattern, got {quoted(source)}: no such file"
        )
    return sorted(matches)


def _matches(pattern: Path) -> list[Path]:
    """What a glob pattern matches; its leading folders that exist are taken by name, "books [en]/*.txt"."""
    names = [*reversed(pattern.parents), pattern]
    literal = max((path for path in names if path.exists()), key=lambda path: len(path.parts), default=Path())
    rest = str(pattern.relative_to(literal))
    return [literal / match for match in glob.glob(rest, root_dir=literal, recursive=True)]


def read_documents(files: list[Path], text_field: str) -> Iterator[Document]:
    """Walk through the documents of `files` in order.

    Args:
        files: From `find_files`. A text file is one document; a line of JSONL or a row of a table is one.
        text_field: The field that holds the text, in JSONL and tables.

    Raises:
        ValueError: A file is damaged or lacks the field; the message names file and line.
    """
    for path in files:
        kind = kind_of(path)
        if kind == "lines":
            yield from _read_lines(path, text_field)
        elif kind == "table":
            for number, (text, bytes_read) in enumerate(read_table(path, text_field), start=1):
                yield Document(text, f"{path}, row {number}", bytes_read)
        else:
            yield Document(read_text(path), str(path), path.stat().st_size)


def _read_lines(path: Path, text_field: str) -> Iterator[Document]:
    with path.open("rb") as raw:
        position = 0
        for number, line in enumerate(read_lines(path, raw), start=1):
            origin = f"{path}, line {number}"
            # a mark at the start is no part of the first record
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            text = _text_of(line, text_field, origin) if line.strip() else b""
            before, position = position, raw.tell()
            yield Document(text, origin, position - before)


def _text_of(line: bytes, text_field: str, origin: str) -> bytes:
    try:
        record = json.loads(line.decode())
    except ValueError as error:
        raise ValueError(f"{origin} is not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{origin} is nested too deeply") from None
    if isinstance(record, dict) and text_field in record and record[text_field] is None:
        warn(f"{origin}: {text_field} is null: the document is left out")
        return b""
    if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
        found = shown(", ".join(record)) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{origin} has no text in field {quoted(text_field)}, found {found}; set text_field")
    try:
        return record[text_field].encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{origin} holds half a surrogate pair, which is not Unicode text: {error}") from None


def _walk(folder: Path) -> Iterator[Path]:
    """All files beneath a folder; a folder that is reached again by a link is not entered again."""
    entered: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        entered.add(os.path.realpath(root))
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(root, name)) not in entered]
        yield from (path for path in (Path(root) / name for name in names) if path.is_file())


def _sorted(files: list[Path], root: Path) -> list[Path]:
    # by relative path, so that the order does not depend on where the folder lies
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)
