"""Rows of text from tables: Parquet and Arrow files, and data sets that Hugging Face's `datasets` saved to disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_lighthouse.checks import quoted, shown, warn

TABLE_SUFFIXES = (".parquet", ".arrow")
# Rows at a time: a long document can hold megabytes
BATCH_ROWS = 64
# Ends every complete Arrow stream
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
# What `datasets` writes into the folder of a saved data set, and of a dictionary of them
STATE, SPLITS = "state.json", "dataset_dict.json"


def find_table_files(folder: Path) -> list[Path]:
    """The files of a saved data set in the order of its rows; none if `folder` holds something else.

    Raises:
        FileNotFoundError: A file that the data set consists of is missing.
        ValueError: The folder holds several data sets, or its record is damaged.
    """
    if (folder / SPLITS).is_file():
        splits = " or ".join(str(folder / name) for name in _list(folder / SPLITS, "splits"))
        raise ValueError(f"source {folder} holds several splits, choose one: {splits}")
    # a folder of text may have a state.json of its own
    if not (folder / STATE).is_file() or "_data_files" not in _read(folder / STATE):
        return []
    files = [folder / Path(name).name for name in _list(folder / STATE, "_data_files", "filename")]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, {folder / STATE} names it")
    return files


def _read(record: Path) -> dict[str, Any]:
    try:
        content = json.loads(record.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{record} is cut short or altered: {error}") from None
    return content if isinstance(content, dict) else {}


def _list(record: Path, name: str, key: str | None = None) -> list[str]:
    """The list of that name: of strings, or of what each entry has under `key`."""
    try:
        found = [entry if key is None else entry[key] for entry in _read(record)[name]]
    except (KeyError, TypeError):
        found = [None]
    if not all(isinstance(entry, str) for entry in found):
        raise ValueError(f"{record} is cut short or altered: {name} is no list of {key or 'name'}s")
    return found


def read_table(path: Path, text_field: str) -> Iterator[tuple[bytes, int]]:
    """The rows of one file.

    Args:
        path: A Parquet or Arrow file.
        text_field: The column that holds the text.

    Returns:
        Text of each row, UTF-8, and the bytes of the file that this row stands for.

    Raises:
        ModuleNotFoundError: The pyarrow package is absent.
        ValueError: The file is damaged, or a row has no text; the message names it.
    """
    try:
        pyarrow = import_module("pyarrow")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{path} needs the pyarrow package: pip install pyarrow") from None
    is_parquet = path.suffix.lower() == ".parquet"
    kind = "Parquet" if is_parquet else "Arrow"
    with ExitStack() as stack:
        batches: Iterator[Any] = iter(())
        try:
            open_table = _open_parquet if is_parquet else _open_arrow
            names, num_rows, batches = open_table(path, stack, text_field)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is damaged or no {kind} file: {error}") from None
        if text_field not in names:
            raise ValueError(f"{path} has no column {quoted(text_field)}, found {', '.join(names)}; set text_field")
        unread, row = path.stat().st_size, 0
        while True:
            try:
                batch = next(batches, None)
            except (pyarrow.ArrowException, OSError) as error:
                raise ValueError(f"{path} is damaged after row {row}: {error}") from None
            if batch is None:
                return
            for text in batch.column(text_field).to_pylist():
                row += 1
                if text is None:
                    warn(f"{path}, row {row}: {text_field} is null: the document is left out")
                    text = ""
                if not isinstance(text, str):
                    found = f"{type(text).__name__} {shown(text)}"
                    raise ValueError(f"{path}, row {row} has no text in column {quoted(text_field)}, found {found}")
                # of an Arrow stream the number of rows is not known ahead
                share = unread // (num_rows - row + 1) if num_rows is not None else batch.nbytes // len(batch)
                unread -= share
                yield text.encode(), share


def _open_parquet(path: Path, stack: ExitStack, text_field: str) -> tuple[list[str], int | None, Iterator[Any]]:
    file = stack.enter_context(import_module("pyarrow.parquet").ParquetFile(path))
    names = file.schema_arrow.names
    columns = [text_field] if text_field in names else []
    return names, file.metadata.num_rows, file.iter_batches(batch_size=BATCH_ROWS, columns=columns)


def _open_arrow(path: Path, stack: ExitStack, text_field: str) -> tuple[list[str], int | None, Iterator[Any]]:
    """A stream, as `datasets` writes it, or a file with a table of contents."""
    pyarrow, ipc = import_module("pyarrow"), import_module("pyarrow.ipc")
    # mapped, not read: a batch can be as long as the file
    source = stack.enter_context(pyarrow.memory_map(str(path)))
    try:
        reader = stack.enter_context(ipc.open_stream(source))
        # pyarrow takes a stream that was cut between two batches for a complete one
        source.seek(path.stat().st_size - len(END_OF_STREAM))
        if source.read() != END_OF_STREAM:
            raise OSError("it does not end as a stream does")
        source.seek(0)
        reader = stack.enter_context(ipc.open_stream(source))
        whole = iter(reader)
    except pyarrow.ArrowInvalid:
        reader = stack.enter_context(ipc.open_file(source))
        whole = (reader.get_batch(number) for number in range(reader.num_record_batches))
    parts = (batch.slice(start, BATCH_ROWS) for batch in whole for start in range(0, batch.num_rows, BATCH_ROWS))
    return reader.schema.names, None, parts
