"""What kind of file a source is, by its name and by how it begins; and its lines, unpacked."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal

from lightning_lighthouse.data.preparing.tables import TABLE_SUFFIXES

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".html", ".py", ".c", ".h", ".cpp", ".java", ".js", ".rs", ".go")
LINES_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
PACKED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
# JSON lines have this suffix too, which says nothing: one value over many lines is no text and no documents
JSON_SUFFIX = ".json"
# Rows and columns that would be one long text
REFUSED_SUFFIXES = {".csv": "CSV", ".tsv": "tab-separated values"}
KNOWN = ", ".join((*TEXT_SUFFIXES, *LINES_SUFFIXES, JSON_SUFFIX, *TABLE_SUFFIXES))
# The longer ones first: UTF-32's begins with UTF-16's
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

Kind = Literal["text", "lines", "table"]


def is_known(path: Path) -> bool:
    """Whether a file in a folder of sources is read without being named: by its suffix, and JSON by its content."""
    suffix = _suffix(path)
    if suffix == JSON_SUFFIX:
        # one object alone is a settings file more often than a document
        return _num_records(path) > 1
    return suffix in (*TEXT_SUFFIXES, *LINES_SUFFIXES, *TABLE_SUFFIXES)


def kind_of(path: Path) -> Kind:
    """How to read a file: one text, JSON lines, or a table.

    Raises:
        ValueError: It is clearly structured, and not as one of these.
    """
    suffix = _suffix(path)
    if suffix in TABLE_SUFFIXES:
        return "table"
    if suffix in LINES_SUFFIXES:
        return "lines"
    if suffix in REFUSED_SUFFIXES:
        raise ValueError(
            f"{path} is {REFUSED_SUFFIXES[suffix]}, which is not read: convert it to JSON lines or Parquet"
        )
    # a program may begin with what looks like a record
    if suffix in TEXT_SUFFIXES and suffix != ".txt":
        return "text"
    if _num_records(path) >= (1 if suffix == JSON_SUFFIX else 2):
        return "lines"
    if suffix == JSON_SUFFIX:
        raise ValueError(f"{path} is JSON, but not one object a line: convert it to JSON lines")
    return "text"


def read_text(path: Path) -> bytes:
    """A whole text file, UTF-8, without a byte-order mark.

    Raises:
        ValueError: It is damaged, or binary.
    """
    text = b"".join(read_lines(path))
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if text.startswith(mark):
            try:
                return text.decode(encoding).encode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} begins with the mark of {encoding} and is not: {error.reason}") from None
    # no text holds a zero byte, and nearly every archive or image does so early
    if b"\0" in text[:8192]:
        raise ValueError(f"{path} is binary, not text; known kinds: {KNOWN}")
    return text


def read_lines(path: Path, raw: BinaryIO | None = None) -> Iterator[bytes]:
    """The lines of a file, ends included, unpacked by its suffix.

    Args:
        path: The file.
        raw: It, opened by the caller, who wants to know how far it was read.

    Raises:
        ValueError: It is damaged or cut short.
        ModuleNotFoundError: A package is missing that unpacks it.
    """
    if raw is None:
        with path.open("rb") as own:
            yield from read_lines(path, own)
        return
    try:
        match path.suffix.lower():
            case ".gz":
                yield from gzip.GzipFile(fileobj=raw)
            case ".bz2":
                yield from bz2.BZ2File(raw)
            case ".xz":
                with lzma.open(raw) as unpacked:
                    yield from unpacked
            case ".zst":
                yield from _zstandard_lines(raw)
            case _:
                yield from raw
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        # of what the system cannot read it says the number; bz2 and gzip have none for what they cannot unpack
        if isinstance(error, OSError) and error.errno is not None:
            raise
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
            yield from (whole + b"\n" for whole in complete)
            block = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last frame is incomplete")
    if line:
        yield line


def _suffix(path: Path) -> str:
    """The suffix that says what a file is, in lower case; that of packing is no matter."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _num_records(path: Path) -> int:
    """How many of the first two lines that are not blank are JSON objects; 0 where one of them is none."""
    try:
        first = list(islice((line for line in read_lines(path) if line.strip()), 2))
    except (OSError, ValueError, ModuleNotFoundError):
        # what is wrong with it is said where it is read
        return 0
    return len(first) if all(_is_record(line) for line in first) else 0


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.removeprefix(codecs.BOM_UTF8)), dict)
    except (ValueError, RecursionError):
        return False
