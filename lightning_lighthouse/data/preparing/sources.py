"""Documents from the places where text lies: text files, JSONL, tables, or Python's own standard library.

`find_files` lists the files of a source in a fixed order, `read_documents` walks through them. A document is UTF-8
bytes; its text is never normalised or trimmed.
"""

from __future__ import annotations

import glob
import gzip
import json
import sysconfig
import zlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import BinaryIO, NamedTuple

from lightning_lighthouse.checks import warn
from lightning_lighthouse.data.preparing.tables import TABLE_SUFFIXES, find_table_files, read_table

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".html", ".py", ".c", ".h", ".cpp", ".java", ".js", ".rs", ".go")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
ALL_SUFFIXES = (*TEXT_SUFFIXES, *JSONL_SUFFIXES, *TABLE_SUFFIXES)
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
        files = [file for file in path.rglob("*") if file.is_file() and not _hidden(file, path)]
        known = [file for file in files if file.name.endswith(ALL_SUFFIXES)]
        left_out = sorted(set(files) - set(known))
        if left_out and known:
            warn(
                f"{source}: {len(left_out)} of {len(files)} files are left out, their kind is unknown (first: "
                f"{left_out[0].name}); a pattern such as '{source}/**/*{left_out[0].suffix}' reads them as text"
            )
        if not known:
            raise FileNotFoundError(
                f"source {source} holds no file of a known kind ({', '.join(ALL_SUFFIXES)}); name other text files by "
                f"a pattern: '{source}/**/*'"
            )
        return _sorted(known, path)
    matches = [match for match in _matches(path) if match.is_file()]
    if not matches:
        raise FileNotFoundError(f"source must be a file, a folder or a glob pattern, got {source!r}: no such file")
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
        if path.name.endswith(JSONL_SUFFIXES):
            yield from _read_jsonl(path, text_field)
        elif path.name.endswith(TABLE_SUFFIXES):
            for number, (text, bytes_read) in enumerate(read_table(path, text_field), start=1):
                yield Document(text, f"{path}, row {number}", bytes_read)
        else:
            text = path.read_bytes()
            # no text holds a zero byte, and nearly every archive or image does so early
            if b"\0" in text[:8192]:
                raise ValueError(f"{path} is binary, not text; known kinds: {', '.join(ALL_SUFFIXES)}")
            yield Document(text, str(path), len(text))


def _read_jsonl(path: Path, text_field: str) -> Iterator[Document]:
    with path.open("rb") as raw:
        position = 0
        for number, line in enumerate(_lines(path, raw), start=1):
            origin = f"{path}, line {number}"
            text = _text_of(line, text_field, origin) if line.strip() else b""
            before, position = position, raw.tell()
            yield Document(text, origin, position - before)


def _lines(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    try:
        if path.suffix == ".gz":
            yield from gzip.GzipFile(fileobj=raw)
        elif path.suffix == ".zst":
            yield from _zstandard_lines(raw)
        else:
            yield from raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from None


def _zstandard_lines(raw: BinaryIO) -> Iterator[bytes]:
    try:
        zstandard = import_module("zstandard")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{raw.name} needs the zstandard package: pip install zstandard") from None
    frame, line = None, b""
    # frame by frame: the package's own stream takes a file cut short for a complete one
    while block := raw.read(2**20):
        while block:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                text = frame.decompress(block)
            except zstandard.ZstdError as error:
                raise EOFError(error) from None
            *complete, line = (line + text).split(b"\n")
            yield from complete
            block = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last frame is incomplete")
    yield line


def _text_of(line: bytes, text_field: str, origin: str) -> bytes:
    try:
        record = json.loads(line.decode())
    except ValueError as error:
        raise ValueError(f"{origin} is not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{origin} is nested too deeply") from None
    if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{origin} has no text in field {text_field!r}, found {found}; set text_field")
    try:
        return record[text_field].encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{origin} holds half a surrogate pair, which is not Unicode text: {error}") from None


def _sorted(files: list[Path], root: Path) -> list[Path]:
    # by relative path, so that the order does not depend on where the folder lies
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)
